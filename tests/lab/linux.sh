# Two guests with Debian's kernel for clouds: they are merged, verify their memory meanwhile, and pass an audit.
set -eu
. ./helpers.sh
merge_pair vmlinuz-cloud 9000
