#!/bin/sh
# Checks that the system which Packer booted is in order, and does what only a running system can.
# KERNEL_ARGS: what must stand on the kernel's command line. MODULES: what must load.
set -eu

fail() {
    echo "lvsforge: $1" >&2
    exit 1
}

state=$(systemctl is-system-running --wait) || {
    systemctl --failed --no-legend --plain >&2
    fail "the system is $state after its boot"
}

newest=$(readlink /boot/vmlinuz)
[ "vmlinuz-$(uname -r)" = "$newest" ] || fail "the running kernel is $(uname -r), GRUB's link says $newest"

for argument in $KERNEL_ARGS; do
    tr ' ' '\n' </proc/cmdline | grep -qxF "$argument" || fail "$argument is not on the kernel's command line"
done

for module in ${MODULES:-}; do
    modprobe "$module" || fail "the module $module does not load"
done
