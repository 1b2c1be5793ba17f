# Huge pages of the kernel's under nested paging: they back the guests' memory, and are split where pages are alike.
set -eu
. ./helpers.sh
merge_pair vmlinuz-cloud 3000 --hugepages thp
split=$(number huge_split < /tmp/stats.json)
echo "$split of the first guest's huge pages were split"
[ "${split:-0}" -gt 0 ]
