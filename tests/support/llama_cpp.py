"""Logits of llama.cpp through the C functions that the package xllamacpp carries.

Run by itself, in an environment with xllamacpp: ``python llama_cpp.py MODEL.gguf IDS.json
OUT.npy [control_vector.gguf | lora.gguf]``. A control vector is read by llama.cpp's own reader.
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np

POINTER, SIZE = ctypes.c_void_p, ctypes.c_size_t
READER = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"


class Vector(ctypes.Structure):
    """std::vector."""

    _fields_ = [("start", POINTER), ("end", POINTER), ("capacity", POINTER)]


class Info(ctypes.Structure):
    """common_control_vector_load_info: strength, and a std::string (a pointer to its text)."""

    _fields_ = [("strength", ctypes.c_float), ("text", POINTER)]


class Text(ctypes.Structure):
    """Lay out a string as the ABI of manylinux2014 does: length, room, uses, text."""

    _fields_ = [("length", SIZE), ("capacity", SIZE), ("uses", ctypes.c_int64),
                ("text", ctypes.c_char * 4096)]  # fmt: skip


class Data(ctypes.Structure):
    """common_control_vector_data: width, and a std::vector of floats."""

    _fields_ = [("width", ctypes.c_int), ("values", Vector)]


class Large(ctypes.Structure):
    """Parameters by value, of whatever size they have in this version of llama.cpp."""

    _fields_ = [("bytes", ctypes.c_byte * 1024)]


def functions():
    """The C functions, with their types."""
    import xllamacpp.xllamacpp as package

    library = ctypes.CDLL(package.__file__)

    def function(name, result, *arguments):
        found = library[name]
        found.restype, found.argtypes = result, arguments
        return found

    return function


def control_vector(function, path):
    """Width and values as llama.cpp's own ``common_control_vector_load`` reads them."""
    name = str(path).encode()
    text = Text(len(name), len(name), 1, name)
    info = Info(1.0, ctypes.addressof(text) + Text.text.offset)
    start = ctypes.addressof(info)
    infos = Vector(start, start + ctypes.sizeof(info), start + ctypes.sizeof(info))
    found = function(READER, Data, ctypes.POINTER(Vector))(ctypes.byref(infos))
    values = found.values
    return found.width, values.start, (values.end - values.start) // 4


def logits(model_path, ids, steering=None):
    """Logits of the sequence `ids`, `[len(ids), vocabulary]`, steered by a file of ours."""
    function = functions()
    function("llama_backend_init", None)()
    parameters = function("llama_model_default_params", Large)()
    load = function("llama_model_load_from_file", POINTER, ctypes.c_char_p, Large)
    model = load(str(model_path).encode(), parameters)
    parameters = function("llama_context_default_params", Large)()
    raw = bytes(parameters.bytes)
    halves = b"\1\0\0\0" * 2 + bytes(16)  # the cache's two types, float16, before two null pointers
    automatic = (
        b"\xff" * 16
    )  # four choices left to llama.cpp: the last is flash attention, of halves
    assert raw.count(halves) == raw.count(automatic) == 1
    parameters.bytes[raw.index(automatic) + 12 : raw.index(automatic) + 16] = bytes(4)
    parameters.bytes[raw.index(halves)] = parameters.bytes[raw.index(halves) + 4] = 0  # float32
    context = function("llama_init_from_model", POINTER, POINTER, Large)(model, parameters)
    function("llama_set_n_threads", None, POINTER, ctypes.c_int32, ctypes.c_int32)(context, 1, 1)
    if steering and Path(steering).name.startswith("control"):
        width, values, count = control_vector(function, steering)
        assert width > 0, "llama.cpp refuses the control vector"
        put = function("llama_set_adapter_cvec", ctypes.c_int32, POINTER, POINTER, SIZE,
                       *[ctypes.c_int32] * 3)  # fmt: skip
        # Blocks 1 to the last, as common_init_from_params has it.
        assert put(context, values, count, width, 1, 10_000) == 0
    elif steering:
        load = function("llama_adapter_lora_init", POINTER, POINTER, ctypes.c_char_p)
        lora = load(model, str(steering).encode())
        assert lora, "llama.cpp refuses the LoRA"
        put = function("llama_set_adapters_lora", ctypes.c_int32, POINTER,
                       ctypes.POINTER(POINTER), SIZE, ctypes.POINTER(ctypes.c_float))  # fmt: skip
        assert put(context, (POINTER * 1)(lora), 1, (ctypes.c_float * 1)(1.0)) == 0
    decode = function("llama_decode", ctypes.c_int32, POINTER, Large)
    get_one = function("llama_batch_get_one", Large, POINTER, ctypes.c_int32)
    last = function("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), POINTER, ctypes.c_int32)
    vocabulary = function("llama_model_get_vocab", POINTER, POINTER)(model)
    count = function("llama_vocab_n_tokens", ctypes.c_int32, POINTER)(vocabulary)
    rows = []
    for token in ids:
        one = (ctypes.c_int32 * 1)(token)
        assert decode(context, get_one(ctypes.addressof(one), 1)) == 0
        rows.append(np.ctypeslib.as_array(last(context, -1), (count,)).copy())
    return np.stack(rows)


if __name__ == "__main__":
    model_file, ids_file, out, *files = sys.argv[1:]
    tokens = json.loads(Path(ids_file).read_text())
    np.save(out, np.stack([logits(model_file, tokens, name) for name in (None, *files)]))
