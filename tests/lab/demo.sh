# The demo on kvm_amd: four guests fill their memory, merge it, and verify every word of it.
set -e
samepage demo
