"""Where things are, which device runs them, how files are written, and how errors reach the reader."""

from __future__ import annotations

import ctypes
import functools
import glob
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from helpers.errors import Busy, UserError


def root() -> Path:
    """The root of the checkout, or the folder named by ``METABOOK_ROOT``.

    Returns:
        The folder that holds ``data/`` and ``notebooks/``. It does not depend on the working directory.

    Raises:
        UserError: where the package does not lie in a checkout and ``METABOOK_ROOT`` names none.
    """
    named = os.environ.get("METABOOK_ROOT")
    if named:
        if not Path(named).is_dir():
            raise UserError(f"METABOOK_ROOT names {named}, which is no folder: set it to a checkout of the book")
        return Path(named).resolve()
    base = Path(__file__).resolve().parents[2]
    if not ((base / "_config.yml").is_file() and (base / "data").is_dir()):
        raise UserError(
            f"the helpers in {Path(__file__).parent} are no part of a checkout of the book, which holds the chapters "
            "and data: clone the repository and install it with `pip install -e .`, or set METABOOK_ROOT to a clone"
        )
    return base


def pick_device(name: str) -> torch.device:
    """The device of that name; ``"auto"`` is a GPU where there is one.

    Raises:
        UserError: if the name is unknown or none, or the device is not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise UserError(f"there is no device called {name!r}: use cpu, cuda or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device=cuda was asked for, but PyTorch finds no CUDA device here: "
            "use device=cpu or install a CUDA build of torch"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"there is no device {name!r} among the {torch.cuda.device_count()} GPUs here: use cuda or auto"
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported: use cpu, cuda or auto")
    return device


# For processes side by side: two OpenMP pools on two cores make each other several times slower, and the order of a sum
# depends on the number of threads, so this is also the reproducible choice.
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A seeded random generator on ``device``.

    Raises:
        UserError: for a seed that is no whole number of at least 0 and below 2⁶⁴.

    >>> import helpers, torch
    >>> first, again = (torch.rand(3, generator=helpers.generator(7)) for _ in range(2))
    >>> torch.equal(first, again)
    True
    """
    from helpers.validate import whole  # which needs the UserError of this module

    return torch.Generator(device=device).manual_seed(whole(seed, "seed", 0, 2**64 - 1))


def on_cpu(draws: torch.Generator) -> torch.Generator:
    """The generator, or one on the CPU that it seeds."""
    if draws.device.type == "cpu":
        return draws
    return generator(int(torch.randint(2**62, (1,), generator=draws, device=draws.device)))


def can_compile() -> bool:
    """Whether ``torch.compile`` works here: it is tried once, on one line (some seconds).

    On a CPU it needs a C++ compiler with its libraries and Python's headers, so that a compiler's name says too little.
    """
    cuda = torch.cuda.is_available()
    if not cuda and not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++")):
        return False
    return _compiles("cuda" if cuda else "cpu")


@functools.cache
def _compiles(device: str) -> bool:
    x = torch.ones(3, device=device)
    try:
        with torch.no_grad():
            return torch.equal(torch.compile(lambda x: (x + 1).sin(), dynamic=False)(x), (x + 1).sin())
    except Exception:  # of many kinds, from the compiler's and the linker's to those of missing files
        return False


def keep_memory() -> bool:
    """Tell glibc to keep freed memory instead of returning it to the system; False where that is not possible.

    Large temporaries are otherwise mapped and unmapped, page by page, on every iteration; measured on one CPU thread
    this costs an eager meta-gradient 12 to 70 % of its time.
    """
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        m_mmap_threshold, m_trim_threshold = -3, -1  # the names in malloc.h
        return bool(libc.mallopt(m_mmap_threshold, 1 << 30) and libc.mallopt(m_trim_threshold, 2**31 - 1))
    except (OSError, AttributeError):
        return False


def fast_products() -> bool:
    """Let oneDNN multiply float32 matrices on the CPU instead of PyTorch's default library; False where it may not.

    Measured on an AMD processor, batched products of this book's sizes are then up to twice as fast. PyTorch opens that
    way with a setting that also allows coarser products, so it is kept only where the products come out in float32
    accuracy here. It holds for the whole process: for `metabook train`, not for notebooks.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    draws = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 80, 576, generator=draws), torch.randn(4, 576, 64, generator=draws)
    exact = a.double() @ b.double()
    if (((a @ b) - exact).norm() / exact.norm()).item() < 2e-6:
        return True
    torch.set_float32_matmul_precision(before)
    return False


def allow_tf32(allowed: bool) -> None:
    """Whether a GPU may round the factors of float32 products to TF32, which keeps three digits and is faster.

    PyTorch allows it in convolutions and not in matrix products; here it is one choice, for the whole process, and
    records name it (:func:`machine`).
    """
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def make_worker(device: torch.device | str, tf32: bool = False) -> None:
    """Make this process one of several that train side by side, which computes with one thread as a command would."""
    torch.set_num_threads(1)
    keep_memory()
    allow_tf32(tf32)
    if torch.device(device).type == "cpu":
        fast_products()


def peak_memory(function: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Bytes of tensors alive at the worst moment of ``function()``, beyond what was alive before it.

    Counted at PyTorch's allocator, allocation by allocation, so temporaries inside an operation are included and
    nothing is estimated. On a GPU it is the allocator's own peak.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    settings = {"activities": [torch.profiler.ProfilerActivity.CPU], "profile_memory": True}
    sys.stderr.flush()
    loud = os.dup(2)
    try:
        with open(os.devnull, "w") as silent:
            os.dup2(silent.fileno(), 2)  # the profiler announces itself there
        with torch.profiler.profile(**settings) as profiler:
            result = function()
        del result
    finally:
        os.dup2(loud, 2)
        os.close(loud)
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, a crash or a full disk never leaves half of it.

    Raises:
        UserError: if it cannot be written; what stood there before is untouched.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException as error:  # Ctrl-C, a full disk
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        kept = "the previous file is intact" if os.path.exists(path) else "nothing was written"
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): "
            f"free space or allow writing there, then run again; {kept}"
        ) from None


def remove_leftovers(path: Path) -> None:
    """Remove what calls of :func:`write_atomically` that were killed left beside a file.

    Only for whoever holds the lock (:func:`only_one`): another process may be writing.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.????????"):  # as the module tempfile names them
        leftover.unlink(missing_ok=True)


def set_aside(path: Path) -> Path | None:
    """Rename a file so that another can take its place, and return its new name; None where there is no file."""
    if not path.exists():
        return None
    names = (path.with_name(f"{path.name}.old{number or ''}") for number in range(1_000_000))
    free = next(name for name in names if not name.exists())
    os.replace(path, free)
    return free


def ensure_writable(folder: Path) -> None:
    """Make the folder where it is missing, and try to write there.

    Raises:
        UserError: if that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"?")
    except OSError as error:
        raise UserError(
            f"cannot write into {folder} ({error.strerror or error}): free space or allow writing there, then run again"
        ) from None


@contextmanager
def only_one(path: Path, task: str) -> Iterator[None]:
    """Keep a second process from working on the same file or folder; the lock goes with the process, however it ends.

    What a killed process left of the file is removed (:func:`remove_leftovers`).

    Args:
        path: the file or folder; the lock is a hidden file beside the one or in the other, so that all processes agree
            on it whatever their folders for temporary files are.
        task: what is being done, for the message.

    Raises:
        helpers.errors.Busy: if another process is at it.
        UserError: if nothing can be written there.
    """
    try:
        import fcntl
    except ImportError:  # not a Unix
        yield
        return
    lock = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    ensure_writable(lock.parent)
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UserError(f"cannot open the lock {lock} ({error.strerror}): remove it, then run again") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise Busy(f"another process is {task} at this moment: wait until it ends, or stop it") from None
        except OSError:  # a file system without locks
            break
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), lock.stat()):
                break
        os.close(handle)  # whoever held it has removed it since it was opened
    try:
        if lock.parent == path.parent:
            remove_leftovers(path)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def commit() -> str:
    """The commit of the code that runs, with ``+`` where it was changed since; not that of :func:`root`.

    Where the package is no tracked part of a repository, as where a copy of the checkout was sent to another machine or
    it is installed in an environment inside somebody's repository, it is what ``METABOOK_COMMIT`` says, or
    ``"unknown"``.
    """
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        ran = subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, check=True)
        return ran.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("METABOOK_COMMIT", "unknown")


def origin(commit: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a record says of when, by which code and where something was computed: commit, date and :func:`machine`."""
    return {"commit": commit, "date": datetime.now(UTC).date().isoformat(), **machine(device)}


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a record says about where it was computed: processor or GPU (with TF32 or without), threads, versions."""
    device = torch.device(device)
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    except OSError:
        pass  # not Linux
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
        **(
            {"tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32}
            if device.type == "cuda"
            else {}
        ),
    }
