# The demo on kvm_amd: four guests fill their memory, merge it, and verify every word of it.
set -eo pipefail
# Lines instead of a picture that is drawn again and again.
samepage demo --cpu 100 | cat
