# A part of all checks: two guests with Debian's kernel for clouds are merged while they boot and work, and verify
# their memory.
set -eu
. ./helpers.sh
merge_pair vmlinuz-cloud 2500
