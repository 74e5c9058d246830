/* ipvsadm's own source around a main() that prints a connection table from standard input: `conns [-n] [-p]`.
 * The file itself is the kernel's, and there is none here.
 */
#define main ipvsadm_main
#include "ipvsadm.c"
#undef main

int main(int argc, char **argv)
{
	unsigned int format = FMT_NONE;

	while (--argc > 0)
		format |= strcmp(argv[argc], "-n") ? FMT_PERSISTENTCONN : FMT_NUMERIC;
	print_conns(stdin, format);
	return 0;
}
