"""Compile the C files of this folder with the machine's own compiler, once, and load them.

The same sources make two libraries: one whose matrix products multiply float32 numbers, and one
with -DBFLOAT16 (machine.h). A library is kept in the user's cache folder under a name of two parts:
one made of the sources, the flags and what the compiler says of this processor, so that any change
makes a new one, the other of the library's own bytes, so that a damaged one is never loaded.
It is written under a temporary name, tried out in a process of its own and only then renamed: two
processes that compile at once do no harm, and a library that crashes is never loaded here.
"""

from __future__ import annotations

import ctypes, functools, hashlib, os, shutil, subprocess, sys, tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ("gemm.c", "layer.c", "attention.c", "weights.c", "block.c", "trunk.c", "head.c",
           "rollout.c", "decode.c")
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math",
         "-ffp-contract=fast", "-fopenmp-simd",  # simd pragmas only: no OpenMP threads
         "-fvisibility=hidden", "-pthread")
PRODUCTS = {"float32": (), "bfloat16": ("-DBFLOAT16",)}  # flags of each library
FLOAT32_ONLY = ("decode.c",)  # files that are not compiled for bfloat16
TARGETS = (("-march=native",), ("-mcpu=native",), ())  # the first that this compiler knows
TIMEOUT = 120  # s, for a compiler that hangs


class Shape(ctypes.Structure):
    """The Shape of kernels.h."""

    _fields_ = [(name, ctypes.c_int64) for name in (
        "dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size")] + [
        ("norm_eps", ctypes.c_float)]


# One letter per argument: p pointer, i long, f float, n int. Every function returns an int.
SIGNATURES = {
    "trunk_forward": "piippppppppn",
    "trunk_backward": "piipppppppppnn",
    "head_forward": "iiippppfpppn",
    "head_backward": "iiippppfpppppn",
    "rollout": "ppppiiippppppffiipppn",
    "quantise": "pipn",
    "generate": "piipifffiippn",
    "self_test": "",
}
SIZES = {"saved_size": "pi", "kept_size": "ii", "row_cache_size": "pi", "packed_bytes": "iii",
         "cache_numbers": "pi"}
TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_long, "f": ctypes.c_float, "n": ctypes.c_int}


def cache_folder() -> Path:
    """A folder of this user alone, made if need be; OSError if there is no place for one.

    In XDG_CACHE_HOME or ~/.cache, or, where these cannot be written or there is no home, in the
    system's folder for temporary files. Others may not write there: what is in it will run here.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0  # Windows has no such numbers
    bases = [os.environ.get("XDG_CACHE_HOME"), os.path.expanduser("~/.cache"),
             tempfile.gettempdir()]
    why = "no folder for it"
    for base in bases:
        if not base or base.startswith("~"):  # not set; a user without a home
            continue
        folder = Path(base) / f"llama2-kernels-{user}"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat()
        except OSError as e:
            why = str(e)
            continue
        ours = found.st_uid == user and not found.st_mode & 0o022
        if ours and os.access(folder, os.W_OK):
            return folder
        why = f"{folder} belongs to another user, or others may write there"
    raise OSError(f"no cache folder for the compiled kernels: {why}")


def digest(content: bytes) -> str:
    """The part of a name that stands for these bytes."""
    return hashlib.sha256(content).hexdigest()[:20]


def cached_library(folder: Path, name: str) -> Path | None:
    """The library of this name whose bytes are still those it was written with; None without one.

    The system maps a library without looking at it: of a truncated one the process would die. A
    damaged one is removed.
    """
    for library in sorted(folder.glob(f"{name}-*.so")):
        try:
            if library.stem == f"{name}-{digest(library.read_bytes())}":
                return library
            library.unlink()
        except OSError:
            pass  # unreadable, or gone by now: as good as none
    return None


def _run(command: list[str], **options) -> subprocess.CompletedProcess:
    """A finished process; OSError with one line, also if it hangs."""
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace",
                              timeout=TIMEOUT, stdin=subprocess.DEVNULL, **options)
    except subprocess.TimeoutExpired as e:
        raise OSError(f"{command[0]} did not end within {TIMEOUT} s") from e


def fastest_products() -> str:
    """bfloat16 where one instruction multiplies it faster than float32, else float32; OSError.

    Not with AMX, that is on Intel's processors: on one (Xeon, 2 threads) a training step in float32
    was 1.2 to 1.5 times as fast as in bfloat16, a rollout 0.9 to 1.1 times. An Intel processor that
    shows no AMX is not recognised.
    """
    macros = find_compiler()[1]
    worth_it = "__AVX512BF16__" in macros and "__AMX_TILE__" not in macros
    return "bfloat16" if worth_it else "float32"


def find_compiler() -> tuple[list[str], str]:
    """(command with flags, what it says of itself and of this processor); OSError if none works."""
    named = os.environ.get("CC")
    names = named.split() if named else None
    candidates = [names] if names else [[n] for n in ("cc", "gcc", "clang") if shutil.which(n)]
    if not candidates:
        raise OSError("no C compiler found (cc, gcc or clang)")
    for command in candidates:
        for target in TARGETS:
            macros = _run([*command, *target, "-dM", "-E", "-x", "c", os.devnull])
            if macros.returncode == 0:
                return [*command, *FLAGS, *target], macros.stdout
    raise OSError(f"the compiler {' '.join(candidates[-1])} does not work: {_last_line(macros)}")


def _last_line(process: subprocess.CompletedProcess) -> str:
    """The line of its output that says most, or how it ended."""
    lines = (process.stderr or process.stdout).strip().splitlines()
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [f"exit code {process.returncode}"])[0][:200]


def compile_library(products: str = "float32", extra: tuple[Path, ...] = ()) -> Path:
    """The path of the library for these sources, flags and processor, compiled if need be.

    products: what its matrix products multiply, float32 or bfloat16. extra: more C files, which
    become one library with the kernels and may call all of their functions, the hidden ones too.
    OSError with one line when there is no compiler, or when what it makes does not work.
    """
    command, target = find_compiler()
    command = [*command, *PRODUCTS[products]]
    files = sorted(p for p in FOLDER.iterdir() if p.suffix in (".c", ".h"))
    contents = [p.name + "\0" + p.read_text(encoding="utf-8") for p in [*files, *extra]]
    name = "kernels-" + digest("\0".join([*command, target, *contents]).encode())
    folder = cache_folder()
    library = cached_library(folder, name)
    if library:
        return library
    handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=folder)
    os.close(handle)
    try:
        sources = [str(FOLDER / s) for s in SOURCES
                   if products == "float32" or s not in FLOAT32_ONLY]
        sources += map(str, extra)
        made = _run([*command, *sources, "-o", temporary, "-lm"])
        if made.returncode:
            raise OSError(f"{command[0]} failed: {_last_line(made)}")
        tried = _run([sys.executable, "-c", "import ctypes, sys; "
                      "sys.exit(ctypes.CDLL(sys.argv[1]).self_test())", temporary])
        if tried.returncode:
            raise OSError(f"{command[0]} made a library that fails its own test "
                          f"({_last_line(tried)})")
        library = folder / f"{name}-{digest(Path(temporary).read_bytes())}.so"
        os.replace(temporary, library)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return library


@functools.cache
def load_library(products: str = "float32", extra: tuple[Path, ...] = ()) -> ctypes.CDLL:
    """The compiled functions with their argument types set; OSError when they cannot be had."""
    lib = ctypes.CDLL(str(compile_library(products, extra)))
    lib.isa.restype = lib.products.restype = ctypes.c_char_p
    for table, result in ((SIGNATURES, ctypes.c_int), (SIZES, ctypes.c_long)):
        for name, letters in table.items():
            if hasattr(lib, name):  # those of FLOAT32_ONLY are in one library alone
                function = getattr(lib, name)
                function.argtypes, function.restype = [TYPES[c] for c in letters], result
    return lib
