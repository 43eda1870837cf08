"""Offline inference with `LLM(...)`: the decode role without a server, prefilling on a running prefill engine.

python examples/03_offline/offline.py MODEL disagg.yaml [DTYPE]
"""

import sys

from vllm import LLM, SamplingParams

import disagg_vllm


def main(model: str, config_file: str, dtype: str = "auto") -> None:
    disagg_vllm.register()  # LLM(...) reads the dict below before it loads plugins; this fills in disagg's defaults
    llm = LLM(
        model=model,
        dtype=dtype,
        enforce_eager=True,
        kv_transfer_config={
            "kv_connector": "disagg",
            "kv_connector_extra_config": {"config_file": config_file, "role": "decode"},
        },
    )
    prompt = "List everything that a ship's captain should check before leaving the harbour. " * 30
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=16))
    print(repr(output.outputs[0].text))


if __name__ == "__main__":
    main(*sys.argv[1:])
