# Two guests of 6 GiB, whose memory lies below 3 GiB and from 4 GiB on. Linux uses the upper part first: what they fill is
# there, is merged, and stays as it was.
set -eu
. ./helpers.sh
MEMORY=6G
merge_pair vmlinuz-cloud 9000 --overcommit 16
for vm in web-0 web-1; do
    pages=$(sed -n 's/^guest: \([0-9]*\) pages above 4 GiB.*/\1/p' "/tmp/$vm.log")
    echo "$vm filled $pages pages above 4 GiB"
    [ "$pages" -ge 2600 ]
done
