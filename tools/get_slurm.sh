#!/bin/sh
# Download Debian's SLURM packages and extract them into a folder, for tests/launch/test_real_slurm.py. Installs nothing.
#
#     sh tools/get_slurm.sh FOLDER; STABLETRAIN_SLURM=FOLDER pytest -m slow tests/launch/test_real_slurm.py
set -eu
[ $# -eq 1 ] || { echo "usage: sh tools/get_slurm.sh FOLDER" >&2; exit 2; }
mkdir -p "$1"
cd "$1"
apt-get download slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge libmunge2 libhwloc15 liblua5.1-0
for package in ./*.deb; do
    dpkg -x "$package" .
    rm "$package"
done
missing=$(LD_LIBRARY_PATH=$(echo "$PWD"/usr/lib/*-linux-gnu):$(echo "$PWD"/usr/lib/*-linux-gnu/slurm-wlm) \
    ldd usr/sbin/slurmd-wlm usr/sbin/slurmctld-wlm usr/sbin/munged usr/bin/srun | grep 'not found' || true)
[ -z "$missing" ] || { echo "libraries that this machine does not have:" >&2; echo "$missing" >&2; exit 1; }
