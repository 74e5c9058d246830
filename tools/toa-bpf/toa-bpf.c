// SPDX-License-Identifier: GPL-2.0-only
/*
 * toa-bpf: puts the programs of toa-bpf.bpf.c into the kernel, tells them whom to believe, and shows what they count.
 *
 * Nothing of it stays running. Maps and links are pinned, so that what was learned of connections outlives every call of
 * this program; a newer one replaces the programs in their links without a gap.
 */

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <bpf/bpf.h>
#include <bpf/libbpf.h>

#include "toa-bpf.h"
#include "toa-bpf.skel.h"

#define BPFFS "/sys/fs/bpf"
#define PINS BPFFS "/toa"
#define CONFIG "/etc/toa-bpf.conf"
#define LOCK "/run/toa-bpf.lock"

struct prefix {
	int family;
	bool there;	/* in the map */
	struct toa_prefix key;
};

enum key { TRUSTED, KINDS, CGROUP, CARRIER, KEYS };

static const char *const keys[KEYS] = {"trusted", "kinds", "cgroup", "carrier"};

struct config {
	const char *path;
	int errors;
	int line[KEYS];	/* in which a key is; 0: in none */
	char cgroup[4096];
	int directory;	/* the cgroup's, which is open */
	__u64 number;	/* the cgroup's */
	bool carrier;
	struct toa_kinds kinds;
	unsigned int prefixes;
	struct prefix prefix[TOA_PREFIXES];
};

static const char *const counters[TOA_COUNTERS] = {
	[TOA_CHILD] = "syn_recv_sock_toa",
	[TOA_CHILD_NONE] = "syn_recv_sock_no_toa",
	[TOA_LATER] = "later_segment_toa",
	[TOA_UNTRUSTED] = "untrusted_toa",
	[TOA_NO_MEMORY] = "no_memory_toa",
	[TOA_NAME_OK] = "getname_toa_ok",
	[TOA_NAME_MISMATCH] = "getname_toa_mismatch",
	[TOA_NAME_BYPASS] = "getname_toa_bypass",
	[TOA_NAME_EMPTY] = "getname_toa_empty",
};

static bool verbose;

static int say(enum libbpf_print_level level, const char *format, va_list words)
{
	if (level == LIBBPF_DEBUG && !verbose)
		return 0;
	return vfprintf(stderr, format, words);
}

__attribute__((format(printf, 1, 2))) static int fail(const char *format, ...)
{
	va_list words;

	va_start(words, format);
	fputs("toa-bpf: ", stderr);
	vfprintf(stderr, format, words);
	fputc('\n', stderr);
	va_end(words);
	return -1;
}

/* --- configuration */

__attribute__((format(printf, 3, 4))) static void wrong(struct config *config, int line, const char *format, ...)
{
	va_list words;

	va_start(words, format);
	fprintf(stderr, line ? "toa-bpf: %s:%d: " : "toa-bpf: %s: ", config->path, line);
	vfprintf(stderr, format, words);
	fputc('\n', stderr);
	va_end(words);
	config->errors++;
}

/* The number that is all of the text, or -1 */
static int number(const char *text, int most)
{
	int value = 0;

	if (!*text)
		return -1;
	for (; *text; text++) {
		if (!isdigit((unsigned char)*text))
			return -1;
		value = value * 10 + (*text - '0');
		if (value > most)
			return -1;
	}
	return value;
}

static struct prefix *find(struct config *config, int family, const struct toa_prefix *key)
{
	size_t size = family == AF_INET ? 8 : sizeof(*key);

	for (unsigned int n = 0; n < config->prefixes; n++)
		if (config->prefix[n].family == family && !memcmp(&config->prefix[n].key, key, size))
			return &config->prefix[n];
	return NULL;
}

static void read_prefix(struct config *config, int line, char *word)
{
	static const unsigned char mapped[12] = {[10] = 0xff, [11] = 0xff};
	struct prefix found = {.family = AF_INET};
	char *slash = strchr(word, '/'), four[INET_ADDRSTRLEN];
	unsigned char *bytes = (unsigned char *)found.key.addr;
	int most = 32, len;

	if (config->prefixes == TOA_PREFIXES) {
		wrong(config, line, "more than %d prefixes", TOA_PREFIXES);
		return;
	}
	if (slash)
		*slash++ = '\0';
	if (inet_pton(AF_INET, word, bytes) != 1) {
		if (inet_pton(AF_INET6, word, bytes) != 1) {
			wrong(config, line, "%s is no address", word);
			return;
		}
		found.family = AF_INET6;
		most = 128;
	}
	len = slash ? number(slash, most) : most;
	if (len < 0) {
		wrong(config, line, "%s/%s: the length is a number up to %d", word, slash, most);
		return;
	}
	for (int bit = len; bit < most; bit++) {
		if (bytes[bit / 8] & (0x80 >> bit % 8)) {
			wrong(config, line, "%s/%d: bits behind the length are set", word, len);
			return;
		}
	}
	if (found.family == AF_INET6 && !memcmp(bytes, mapped, sizeof(mapped))) {
		inet_ntop(AF_INET, bytes + sizeof(mapped), four, sizeof(four));
		wrong(config, line, "%s/%d is v4-mapped and would match nobody: write %s/%d", word, len, four,
		      len - 8 * (int)sizeof(mapped));
		return;
	}
	found.key.len = len;
	if (!find(config, found.family, &found.key))
		config->prefix[config->prefixes++] = found;
}

static void read_kind(struct config *config, int line, char *word)
{
	/* Those that TCP itself knows */
	static const int taken[] = {0, 1, 2, 3, 4, 5, 8, 19, 29, 30, 34};
	int kind = number(word, 255);

	if (kind < 0) {
		wrong(config, line, "%s is no kind of option (0 to 255)", word);
		return;
	}
	for (unsigned int n = 0; n < sizeof(taken) / sizeof(*taken); n++) {
		if (kind == taken[n]) {
			wrong(config, line, "kind %d has another meaning in TCP", kind);
			return;
		}
	}
	config->kinds.bits[kind / 8] |= 1 << kind % 8;
}

static void read_words(struct config *config, int line, char *text,
		       void (*one)(struct config *config, int line, char *word))
{
	char *rest = NULL;

	for (char *word = strtok_r(text, ", \t", &rest); word; word = strtok_r(NULL, ", \t", &rest))
		one(config, line, word);
}

static void read_line(struct config *config, int line, const char *word, char *value)
{
	enum key key = 0;

	while (key < KEYS && strcmp(word, keys[key]))
		key++;
	if (key < KEYS && config->line[key]) {
		wrong(config, line, "%s is in line %d already", word, config->line[key]);
		return;
	}
	if (key < KEYS)
		config->line[key] = line;
	switch (key) {
	case TRUSTED:
		config->prefixes = 0;
		read_words(config, line, value, read_prefix);
		break;
	case KINDS:
		memset(&config->kinds, 0, sizeof(config->kinds));
		read_words(config, line, value, read_kind);
		break;
	case CGROUP:
		config->cgroup[0] = '\0';
		if (*value != '/' || strlen(value) >= sizeof(config->cgroup))
			wrong(config, line, "the path of a cgroup is absolute");
		else
			strcpy(config->cgroup, value);
		break;
	case CARRIER:
		if (strcmp(value, "yes") && strcmp(value, "no"))
			wrong(config, line, "carrier is yes or no");
		config->carrier = !strcmp(value, "yes");
		break;
	case KEYS:
		wrong(config, line, "%s: no such key; there are trusted, kinds, cgroup, carrier", word);
	}
}

static char *trimmed(char *text)
{
	char *end;

	while (isspace((unsigned char)*text))
		text++;
	end = text + strlen(text);
	while (end > text && isspace((unsigned char)end[-1]))
		end--;
	*end = '\0';
	return text;
}

/* It is judged with the file, of which an error changes nothing, and not when there is something to attach to it. */
static void open_cgroup(struct config *config)
{
	int line = config->line[CGROUP];
	struct stat directory;
	struct statfs about;

	config->directory = open(config->cgroup, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (config->directory < 0 || fstat(config->directory, &directory) || fstatfs(config->directory, &about)) {
		wrong(config, line, "cgroup %s: %s; name one that is there before, as the root is", config->cgroup,
		      strerror(errno));
		return;
	}
	if (about.f_type != CGROUP2_SUPER_MAGIC) {
		wrong(config, line, "%s is no cgroup of version 2: findmnt -t cgroup2 shows what cgroup = should say",
		      config->cgroup);
		return;
	}
	config->number = directory.st_ino;
}

/* All of the file, with every error in it; what it does not say is as in the module. */
static int read_config(struct config *config)
{
	char trusted[] = "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7", kinds[] = "253 254";
	ssize_t length;
	char *text = NULL;
	size_t room = 0;
	int line, err = 0;
	FILE *file;

	strcpy(config->cgroup, "/sys/fs/cgroup");
	read_words(config, 0, trusted, read_prefix);
	read_words(config, 0, kinds, read_kind);

	file = fopen(config->path, "re");
	if (!file)
		return fail("%s: %s", config->path, strerror(errno));
	for (line = 1; (length = getline(&text, &room, file)) >= 0; line++) {
		char *key, *value, *hash = strchr(text, '#');

		/* As in a file that a crash left without its text: what is behind it would not be seen. */
		if (strlen(text) != (size_t)length) {
			wrong(config, line, "this is no text: it has a byte 0");
			continue;
		}
		if (hash)
			*hash = '\0';
		key = trimmed(text);
		if (!*key)
			continue;
		value = strchr(key, '=');
		if (!value) {
			wrong(config, line, "a line is KEY = VALUE");
			continue;
		}
		*value++ = '\0';
		read_line(config, line, trimmed(key), trimmed(value));
	}
	/* What is not read is no empty file, which says that the defaults hold. */
	if (!feof(file))
		err = fail("%s:%d: %s", config->path, line, strerror(errno));
	free(text);
	fclose(file);
	if (!err && config->cgroup[0])
		open_cgroup(config);
	return config->errors ? -1 : err;
}

/* --- maps */

/* Add so many prefixes that are not there yet. Older kernels have no room in a full map even for what is there. */
static int add_trusted(struct config *config, int map, int family, unsigned int room)
{
	char one = 1;

	for (unsigned int n = 0; n < config->prefixes && room; n++) {
		struct prefix *prefix = &config->prefix[n];

		if (prefix->family != family || prefix->there)
			continue;
		if (bpf_map_update_elem(map, &prefix->key, &one, BPF_ANY))
			return fail("adding a trusted prefix: %s", strerror(errno));
		prefix->there = true;
		room--;
	}
	return 0;
}

/* How many prefixes are in the map, or -1. Those that the configuration has are marked, the others of them are returned. */
static int read_trusted(struct config *config, int map, int family, struct toa_prefix *gone, unsigned int *going)
{
	struct toa_prefix key, next;
	struct prefix *found;
	int there = 0;

	*going = 0;
	memset(&next, 0, sizeof(next));
	while (!bpf_map_get_next_key(map, there ? &key : NULL, &next)) {
		if (there++ == TOA_PREFIXES)
			return fail("the list of trusted prefixes does not end: toa-bpf unload, toa-bpf load");
		found = find(config, family, &next);
		if (found)
			found->there = true;
		else
			gone[(*going)++] = next;
		key = next;
	}
	return errno == ENOENT ? there : fail("reading the trusted prefixes: %s", strerror(errno));
}

/*
 * New prefixes come before old ones go, so that a load balancer that is in both lists is trusted at every moment. Only
 * where the map has no room for all of both lists, the rest of the new ones waits.
 */
static int set_trusted(struct config *config, int map, int family)
{
	struct toa_prefix gone[TOA_PREFIXES];
	unsigned int going;
	int there = read_trusted(config, map, family, gone, &going);

	if (there < 0 || add_trusted(config, map, family, TOA_PREFIXES - there))
		return -1;
	for (unsigned int n = 0; n < going; n++)
		if (bpf_map_delete_elem(map, &gone[n]))
			return fail("removing a trusted prefix: %s", strerror(errno));
	return add_trusted(config, map, family, TOA_PREFIXES);
}

static int set_kinds(const struct config *config, int map)
{
	__u32 zero = 0;

	return bpf_map_update_elem(map, &zero, &config->kinds, BPF_ANY) ? fail("setting the kinds: %s", strerror(errno)) : 0;
}

/* --- what the kernel uses now, beside the file */

static int differs(const struct config *config, enum key key, const char *value, bool loaded)
{
	return fail(loaded ? "%s: %s is loaded; by %s it should not be: toa-bpf load" :
			     "%s: %s is not loaded; by %s it should be: toa-bpf load", keys[key], value, config->path);
}

static int open_map(const char *path)
{
	int map = bpf_obj_get(path);

	return map < 0 ? fail("%s: %s: toa-bpf load", path, strerror(errno)) : map;
}

/* One prefix stands for all that differ, as a load helps them all; first one that is believed and should not be. */
static int judge_trusted(struct config *config, const char *path, int family)
{
	struct toa_prefix gone[TOA_PREFIXES], *odd = NULL;
	char text[INET6_ADDRSTRLEN], value[sizeof(text) + 12];
	unsigned int going;
	int map = open_map(path), there;

	if (map < 0)
		return -1;
	there = read_trusted(config, map, family, gone, &going);
	close(map);
	if (there < 0)
		return -1;
	if (going)
		odd = gone;
	for (unsigned int n = 0; n < config->prefixes && !odd; n++)
		if (config->prefix[n].family == family && !config->prefix[n].there)
			odd = &config->prefix[n].key;
	if (!odd)
		return 0;
	inet_ntop(family, odd->addr, text, sizeof(text));
	snprintf(value, sizeof(value), "%s/%u", text, odd->len);
	return differs(config, TRUSTED, value, going);
}

static int judge_kinds(const struct config *config)
{
	struct toa_kinds loaded;
	__u32 zero = 0;
	int map = open_map(PINS "/toa_kinds");
	char value[4];

	if (map < 0)
		return -1;
	if (bpf_map_lookup_elem(map, &zero, &loaded))
		return fail("reading the kinds: %s", strerror(errno));
	close(map);
	for (int kind = 0; kind < 256; kind++) {
		int bit = 1 << kind % 8;

		if ((loaded.bits[kind / 8] ^ config->kinds.bits[kind / 8]) & bit) {
			snprintf(value, sizeof(value), "%d", kind);
			return differs(config, KINDS, value, loaded.bits[kind / 8] & bit);
		}
	}
	return 0;
}

/* --- links */

/* The last one is there with carrier = yes. */
static const char *const links[] = {"toa_sockops", "toa_getpeername4", "toa_getpeername6", "toa_getsockopt"};
#define LINKS (sizeof(links) / sizeof(*links))

static int pin_path(char *path, size_t size, const char *program)
{
	return snprintf(path, size, PINS "/link_%s", program) < (int)size ? 0 : -1;
}

/* Is a pinned link attached to this cgroup? A cgroup's number is that of its directory; 0: to one that is gone. */
static bool is_at(int link, __u64 cgroup)
{
	struct bpf_link_info info = {};
	__u32 size = sizeof(info);

	return !bpf_obj_get_info_by_fd(link, &info, &size) && info.cgroup.cgroup_id == cgroup;
}

static int attach(struct bpf_program *program, const struct config *config)
{
	const char *name = bpf_program__name(program);
	char path[256];
	struct bpf_link *link;
	int old, err;

	if (pin_path(path, sizeof(path), name))
		return -1;
	old = bpf_obj_get(path);
	if (old >= 0 && is_at(old, config->number) && !bpf_link_update(old, bpf_program__fd(program), NULL)) {
		close(old);
		return 0;
	}
	link = bpf_program__attach_cgroup(program, config->directory);
	if (!link) {
		fail("attaching %s to %s: %s%s", name, config->cgroup, strerror(errno),
		     errno == EPERM ? "; bpftool cgroup tree shows whose program there lets no other in" : "");
		err = -1;
		goto out;
	}
	/* Of another cgroup, or of one that is gone. Until now it has done its work. */
	if (old >= 0 && unlink(path))
		err = -errno;
	else
		err = bpf_link__pin(link, path);
	if (err)
		fail("pinning %s: %s", path, strerror(-err));
	else
		bpf_link__disconnect(link);
	bpf_link__destroy(link);
out:
	if (old >= 0)
		close(old);
	return err;
}

static int detach(const char *program)
{
	char path[256];

	if (pin_path(path, sizeof(path), program) || (unlink(path) && errno != ENOENT))
		return fail("%s: %s", path, strerror(errno));
	return 0;
}

/* Do the programs run, and where this configuration says? A link that is pinned outlives its cgroup and does nothing. */
static int judge_links(const struct config *config)
{
	char path[256];
	int link, err = 0;

	for (unsigned int n = 0; n < LINKS && !err; n++) {
		if (pin_path(path, sizeof(path), links[n]))
			return -1;
		link = bpf_obj_get(path);
		if (link < 0) {
			if (errno != ENOENT || n < LINKS - 1)
				err = fail("%s: %s: toa-bpf load", path, strerror(errno));
			else if (config && config->carrier)
				err = differs(config, CARRIER, "yes", false);
			continue;
		}
		if (n == LINKS - 1 && config && !config->carrier)
			err = differs(config, CARRIER, "yes", true);
		else if (is_at(link, 0))
			err = fail("%s: its cgroup is gone, and the program with it: toa-bpf load", path);
		else if (config && !is_at(link, config->number))
			err = fail("%s is at another cgroup than %s: toa-bpf load", path, config->cgroup);
		close(link);
	}
	return err;
}

/* --- commands */

/* Two at once would pin the same names. */
static int lock(void)
{
	int file = open(LOCK, O_RDWR | O_CREAT | O_CLOEXEC, 0600);

	if (file < 0 || flock(file, LOCK_EX))
		return fail("%s: %s", LOCK, strerror(errno));
	return 0;
}

static int open_pins(void)
{
	struct statfs about;

	if (statfs(BPFFS, &about) || about.f_type != BPF_FS_MAGIC)
		return fail("no BPF file system is mounted: mount -t bpf bpf " BPFFS);
	if (mkdir(PINS, 0700) && errno != EEXIST)
		return fail(PINS ": %s", strerror(errno));
	return 0;
}

static int attach_all(struct toa_bpf *programs, const struct config *config)
{
	int err;

	err = attach(programs->progs.toa_getpeername4, config);
	if (!err)
		err = attach(programs->progs.toa_getpeername6, config);
	if (!err)
		err = attach(programs->progs.toa_sockops, config);
	if (!err)
		err = config->carrier ? attach(programs->progs.toa_getsockopt, config) : detach("toa_getsockopt");
	return err;
}

static int remove_pins(void)
{
	static const char *const maps[] = {"toa_clients", "toa_trusted4", "toa_trusted6", "toa_kinds", "toa_stats"};
	char path[256];
	int err = 0;

	for (unsigned int n = 0; n < LINKS; n++)
		if (detach(links[n]))
			err = -1;
	for (unsigned int n = 0; n < sizeof(maps) / sizeof(*maps); n++) {
		snprintf(path, sizeof(path), PINS "/%s", maps[n]);
		if (unlink(path) && errno != ENOENT)
			err = fail("%s: %s", path, strerror(errno));
	}
	if (rmdir(PINS) && errno != ENOENT)
		err = fail(PINS ": %s", strerror(errno));
	return err;
}

static int load(struct config *config)
{
	LIBBPF_OPTS(bpf_object_open_opts, options, .pin_root_path = PINS);
	struct toa_bpf *programs;
	int err = -1;
	bool first;

	if (read_config(config) || lock())
		return -1;
	first = access(PINS "/link_toa_sockops", F_OK) && errno == ENOENT;
	if (open_pins())
		return -1;
	programs = toa_bpf__open_opts(&options);
	if (!programs) {
		fail("the programs cannot be opened: %s", strerror(errno));
		goto out;
	}
	if (toa_bpf__load(programs)) {
		fail("the kernel does not take the programs; toa-bpf -v load shows why");
		goto out;
	}
	/* First whom to believe, then the programs that ask */
	err = set_trusted(config, bpf_map__fd(programs->maps.toa_trusted4), AF_INET);
	if (!err)
		err = set_trusted(config, bpf_map__fd(programs->maps.toa_trusted6), AF_INET6);
	if (!err)
		err = set_kinds(config, bpf_map__fd(programs->maps.toa_kinds));
	if (!err)
		err = attach_all(programs, config);
out:
	toa_bpf__destroy(programs);
	/* What was loaded before goes on; a part of the programs without the rest would say that they were loaded. */
	if (err && first)
		remove_pins();
	return err;
}

/* A file that is right and not yet loaded is no error: `check && load`. */
static int check(struct config *config)
{
	if (read_config(config))
		return -1;
	/* Nothing is loaded, or whoever asks may not look there. */
	if (access(PINS "/toa_stats", F_OK))
		return 0;
	/* A load changes one thing after the other. */
	if (lock())
		return -1;
	judge_links(config);
	judge_trusted(config, PINS "/toa_trusted4", AF_INET);
	judge_trusted(config, PINS "/toa_trusted6", AF_INET6);
	judge_kinds(config);
	return 0;
}

static int unload(void)
{
	return lock() ? -1 : remove_pins();
}

/* As /proc/net/toa_stats: a line for each counter, a column for each CPU */
static int stats(void)
{
	int cpus = libbpf_num_possible_cpus();
	int map = bpf_obj_get(PINS "/toa_stats");
	__u64 *values;
	int err = 0;

	if (map < 0)
		return fail("%s", errno == ENOENT ? "not loaded: toa-bpf load" : strerror(errno));
	values = cpus > 0 ? calloc(cpus, sizeof(*values)) : NULL;
	if (!values)
		return fail("how many CPUs there are is not known");
	printf("%-24s", "");
	for (int cpu = 0; cpu < cpus; cpu++)
		printf("       CPU%-3d", cpu);
	putchar('\n');
	for (__u32 n = 0; n < TOA_COUNTERS && !err; n++) {
		if (bpf_map_lookup_elem(map, &n, values)) {
			err = fail("reading the counters: %s", strerror(errno));
			break;
		}
		printf("%-24s", counters[n]);
		for (int cpu = 0; cpu < cpus; cpu++)
			printf(" %12llu", (unsigned long long)values[cpu]);
		putchar('\n');
	}
	free(values);
	close(map);
	if (judge_links(NULL))
		err = -1;
	return err;
}

static int usage(void)
{
	fputs("toa-bpf [-c FILE] [-v] load|check|stats|unload\n"
	      "  load    put the programs into the kernel, or replace them, with the configuration as it is now\n"
	      "  check   judge the configuration, and say what of it is not loaded\n"
	      "  stats   show the counters; fails if what is loaded does not run\n"
	      "  unload  take everything out of the kernel\n",
	      stderr);
	return 2;
}

int main(int argc, char **argv)
{
	static struct config config = {.path = CONFIG};
	const char *command;
	int option, err;

	while ((option = getopt(argc, argv, "c:v")) != -1) {
		if (option == 'c')
			config.path = optarg;
		else if (option == 'v')
			verbose = true;
		else
			return usage();
	}
	if (optind != argc - 1)
		return usage();
	command = argv[optind];
	libbpf_set_print(say);
	if (!strcmp(command, "load"))
		err = load(&config);
	else if (!strcmp(command, "check"))
		err = check(&config);
	else if (!strcmp(command, "stats"))
		err = stats();
	else if (!strcmp(command, "unload"))
		err = unload();
	else
		return usage();
	return err ? 1 : 0;
}
