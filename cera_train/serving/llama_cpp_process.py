"""llama.cpp as a process of its own, which a damaged file may end: `python THIS_FILE FILE
POSITIONS THREADS` prints its address, and serves until its stdin closes. Keys, values and attention
are in float32, so that what differs from a run is in the file."""

import os
import sys

import xllamacpp


def main(file: str, positions: str, threads: str) -> None:
    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.n_ctx = int(positions)
    settings.n_parallel = 1
    settings.warmup = False
    settings.verbosity = -1
    settings.cpuparams.n_threads = int(threads)
    settings.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # the server's own end may wait for ever


if __name__ == "__main__":
    main(*sys.argv[1:])
