#!/bin/sh
# Installs what the tests of slurm/ need, Slurm and munge, where it is missing. Ends with 1, and
# says why, where that cannot be done: the tests are then left out.
set -u

missing=
for tool in slurmctld slurmd sbatch munged ip; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || missing="$missing $tool"
done
[ -n "$missing" ] || exit 0

tell() {
    echo "**********************************************************************" >&2
    echo "** tests/slurm will be LEFT OUT: $*" >&2
    echo "**********************************************************************" >&2
    exit 1
}

[ "$(id -u)" = 0 ] || tell "missing:$missing, and only root can install that"
command -v apt-get >/dev/null || tell "missing:$missing; install Slurm and munge (no apt-get here)"
echo "installing Slurm and munge for tests/slurm (missing:$missing)" >&2
log=$(mktemp)
# A mirror that does not answer must not hold up the rest.
if ! {
    timeout 120 apt-get -q update &&
        DEBIAN_FRONTEND=noninteractive timeout 240 apt-get -q install -y --no-install-recommends \
            -o DPkg::Lock::Timeout=60 slurmctld slurmd slurm-client munge iproute2
} >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    rm -f "$log"
    tell "apt-get could not install it (its last lines are above)"
fi
rm -f "$log"
