#!/bin/sh
# Serve a model whose far tokens take 7 times less cache than in 16 bits, from nothing:
#
#     sh examples/calibrate_and_serve.sh MODEL [flags of leank serve and vllm serve]
#
# The first call makes the mask, in minutes; later ones find it. BITS is another size than 2.
set -eu
model=${1:?name a model: a directory or a hub id}
shift

leank doctor # ends here where something is missing, and says what
exec leank serve "$model" --bits "${BITS:-2}" "$@"
