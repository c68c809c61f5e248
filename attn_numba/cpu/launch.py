"""Run one worker on several cores: threads that help the calling one, and that sleep and wake without Python.

A helper is a thread that never comes back from compiled code: it watches its mailbox for a while, then sleeps on a lock
until somebody releases it. Were it to sleep in Python it would need the interpreter's lock before it could begin, which
costs a call of 0.1 ms a third of its time. It is woken when a call begins, so that it is up when the work is known.

The caller posts one ticket into each mailbox and works too. A ticket that nobody has taken when the caller is done is
taken back, so a helper that comes late touches nothing of the call. Numba's own pool (OpenMP) waits for every thread,
and one that another library's spinning threads keep off its core costs milliseconds: measured between two NumPy matrix
products on 2 cores, 5 ms for a call of 1.5 ms. It also ends a forked child that enters it, and its fallback layer
aborts when two threads enter at once.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import threading

import numpy as np

from attn_numba.cpu.hooks import compile_hooks

WATCHES = 3000  # looks into the mailbox before a helper sleeps: about 60 us

# A mailbox, in bytes: lock to wake the helper, lock that says it is done; whether it sleeps, whether a ticket is there;
# the ticket: worker, state, number; and whether the work is finished. Who writes what has cache lines of its own.
WAKE, DONE, ASLEEP, TICKET, WORKER, STATE, NUMBER, FINISHED, MAILBOX = 0, 8, 64, 72, 128, 136, 144, 192, 256

SOURCE = """
{declarations}

define void @serve(i64 %box) {{
  %wake = call i64 @word(i64 %box, i64 {WAKE})
  %done = call i64 @word(i64 %box, i64 {DONE})
  %asleep.at = call ptr @place(i64 %box, i64 {ASLEEP})
  %ticket.at = call ptr @place(i64 %box, i64 {TICKET})
  %finished.at = call ptr @place(i64 %box, i64 {FINISHED})
  br label %watch
watch:
  %posted = call i1 @comes(ptr %ticket.at)
  br i1 %posted, label %take, label %rest
rest:
  store atomic i64 1, ptr %asleep.at seq_cst, align 8
  %late = load atomic i64, ptr %ticket.at seq_cst, align 8
  %missed = icmp eq i64 %late, 1
  br i1 %missed, label %rise, label %sleep
rise:
  %slept = atomicrmw xchg ptr %asleep.at, i64 0 seq_cst
  %alone = icmp eq i64 %slept, 1
  br i1 %alone, label %take, label %sleep  ; if not alone, somebody is releasing the lock
sleep:
  call i32 @acquire(i64 %wake)
  br label %watch
take:
  %old = cmpxchg ptr %ticket.at, i64 1, i64 0 seq_cst seq_cst
  %taken = extractvalue {{i64, i1}} %old, 1
  br i1 %taken, label %work, label %watch
work:
  %worker = call i64 @word(i64 %box, i64 {WORKER})
  %state = call i64 @word(i64 %box, i64 {STATE})
  %number = call i64 @word(i64 %box, i64 {NUMBER})
  call void @compute(i64 %worker, i64 %state, i64 %number)
  store atomic i64 1, ptr %finished.at seq_cst, align 8
  call void @release(i64 %done)
  br label %watch
}}

define void @rouse(i64 %box) {{
  %asleep.at = call ptr @place(i64 %box, i64 {ASLEEP})
  %slept = atomicrmw xchg ptr %asleep.at, i64 0 seq_cst
  %sleeps = icmp eq i64 %slept, 1
  br i1 %sleeps, label %wake, label %end
wake:
  %lock = call i64 @word(i64 %box, i64 {WAKE})
  call void @release(i64 %lock)
  br label %end
end:
  ret void
}}

define void @launch(i64 %worker, i64 %state, i64 %boxes, i64 %count) {{
  br label %head
head:
  %n = phi i64 [0, %0], [%next, %body]
  %more = icmp ult i64 %n, %count
  br i1 %more, label %body, label %own
body:
  %at = mul i64 %n, 8
  %box = call i64 @word(i64 %boxes, i64 %at)
  %next = add i64 %n, 1
  %worker.at = call ptr @place(i64 %box, i64 {WORKER})
  store i64 %worker, ptr %worker.at, align 8
  %state.at = call ptr @place(i64 %box, i64 {STATE})
  store i64 %state, ptr %state.at, align 8
  %number.at = call ptr @place(i64 %box, i64 {NUMBER})
  store i64 %next, ptr %number.at, align 8
  %finished.at = call ptr @place(i64 %box, i64 {FINISHED})
  store i64 0, ptr %finished.at, align 8
  %ticket.at = call ptr @place(i64 %box, i64 {TICKET})
  store atomic i64 1, ptr %ticket.at seq_cst, align 8
  call void @rouse(i64 %box)
  br label %head
own:
  call void @compute(i64 %worker, i64 %state, i64 0)
  br label %collect
collect:
  %m = phi i64 [0, %own], [%after, %collected]
  %left = icmp ult i64 %m, %count
  br i1 %left, label %back, label %end
back:
  %from = mul i64 %m, 8
  %helper = call i64 @word(i64 %boxes, i64 %from)
  %posted.at = call ptr @place(i64 %helper, i64 {TICKET})
  %old = cmpxchg ptr %posted.at, i64 1, i64 0 seq_cst seq_cst
  %idle = extractvalue {{i64, i1}} %old, 1
  br i1 %idle, label %collected, label %wait
wait:
  %ready.at = call ptr @place(i64 %helper, i64 {FINISHED})
  call i1 @comes(ptr %ready.at)  ; most often: then the lock is about to be free
  %done = call i64 @word(i64 %helper, i64 {DONE})
  call i32 @acquire(i64 %done)
  br label %collected
collected:
  %after = add i64 %m, 1
  br label %collect
end:
  ret void
}}

define void @compute(i64 %worker, i64 %state, i64 %number) {{
  {begin}
  %function = inttoptr i64 %worker to ptr
  call void %function(i64 %state, i64 %number)
  {end}
  ret void
}}

define internal i1 @comes(ptr %at) {{
  br label %look
look:
  %n = phi i64 [0, %0], [%next, %none]
  %seen = load atomic i64, ptr %at seq_cst, align 8
  %there = icmp eq i64 %seen, 1
  br i1 %there, label %end, label %none
none:
  {pause}
  %next = add i64 %n, 1
  %patient = icmp ult i64 %next, {WATCHES}
  br i1 %patient, label %look, label %end
end:
  ret i1 %there
}}

define internal ptr @place(i64 %base, i64 %offset) alwaysinline {{
  %sum = add i64 %base, %offset
  %at = inttoptr i64 %sum to ptr
  ret ptr %at
}}

define internal i64 @word(i64 %base, i64 %offset) alwaysinline {{
  %at = call ptr @place(i64 %base, i64 %offset)
  %value = load i64, ptr %at, align 8
  ret i64 %value
}}

define internal i32 @acquire(i64 %lock) {{
  %function = inttoptr i64 {acquire} to ptr
  %got = call i32 %function(i64 %lock, i32 1)
  ret i32 %got
}}

define internal void @release(i64 %lock) {{
  %function = inttoptr i64 {release} to ptr
  call void %function(i64 %lock)
  ret void
}}
"""

_word = ctypes.c_int64
SIGNATURES = {"serve": (_word,), "rouse": (_word,), "launch": (_word,) * 4, "compute": (_word,) * 3}

# A thread of another library may compute with denormals as zeros, and one that it starts does too: XLA's threads do.
# Numbers must not depend on who calls, so work is done in the usual mode, and the caller's is put back.
X86 = {
    "declarations": """declare void @llvm.x86.sse2.pause()
declare void @llvm.x86.sse.stmxcsr(ptr)
declare void @llvm.x86.sse.ldmxcsr(ptr)""",
    "pause": "call void @llvm.x86.sse2.pause()",
    "begin": """%before = alloca i32, align 4
  %usual = alloca i32, align 4
  call void @llvm.x86.sse.stmxcsr(ptr %before)
  store i32 8064, ptr %usual, align 4  ; all exceptions masked, to nearest, denormals kept
  call void @llvm.x86.sse.ldmxcsr(ptr %usual)""",
    "end": "call void @llvm.x86.sse.ldmxcsr(ptr %before)",
}


@functools.cache
def _code() -> dict[str, ctypes._CFuncPtr]:
    """Compile the functions above, in 20 ms; they release the interpreter's lock."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    places = {name: value for name, value in globals().items() if name.isupper() and isinstance(value, int)}
    text = SOURCE.format(
        **(X86 if x86 else dict.fromkeys(X86, "")),
        acquire=_python_function("PyThread_acquire_lock"), release=_python_function("PyThread_release_lock"), **places,
    )  # fmt: skip
    addresses = compile_hooks(text)
    return {name: ctypes.CFUNCTYPE(None, *kinds)(addresses[name]) for name, kinds in SIGNATURES.items()}


def _python_function(name: str) -> int:
    return ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0


def _new_lock() -> int:
    """Return a held lock: the next to acquire it sleeps until somebody releases it."""
    api = ctypes.pythonapi
    api.PyThread_allocate_lock.restype = ctypes.c_void_p
    api.PyThread_acquire_lock.argtypes = (ctypes.c_void_p, ctypes.c_int)
    lock = api.PyThread_allocate_lock()
    if not lock:
        raise MemoryError("no lock for a helper thread")
    api.PyThread_acquire_lock(lock, 1)
    return int(lock)


class Helper:
    """A thread and its mailbox; both last until the process ends."""

    __slots__ = ("address", "box")

    def __init__(self) -> None:
        self.box = np.zeros(MAILBOX + 64, np.uint8)
        self.address = -(-self.box.ctypes.data // 64) * 64
        words = (ctypes.c_int64 * (MAILBOX // 8)).from_address(self.address)
        words[WAKE // 8], words[DONE // 8] = _new_lock(), _new_lock()
        threading.Thread(target=_code()["serve"], args=(self.address,), name="attn_numba", daemon=True).start()


class Team:
    """Helpers for one call: awake from the start of it, free for others at its end."""

    __slots__ = ("_boxes", "_helpers")

    def __init__(self, count: int) -> None:
        self._helpers = [_take() for _ in range(count)]
        self._boxes = (ctypes.c_int64 * count)(*(helper.address for helper in self._helpers))
        for helper in self._helpers:
            _code()["rouse"](helper.address)

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *failure: object) -> None:
        _idle.extend(self._helpers)

    def run(self, worker: int, state: int, count: int) -> None:
        """Run worker numbers 0 to `count - 1` on a state, number 0 in this thread; return when all work is done."""
        if count > 1:
            _code()["launch"](worker, state, ctypes.addressof(self._boxes), count - 1)
        else:
            _code()["compute"](worker, state, 0)


_idle: list[Helper] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # threads do not live on in a forked child


def _take() -> Helper:
    try:
        return _idle.pop()
    except IndexError:
        return Helper()
