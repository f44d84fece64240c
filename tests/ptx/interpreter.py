"""A numpy interpreter of the PTX that Triton makes for the kernels (sm_75 and sm_86).

All threads of a program go in lockstep; branches have to be uniform. Copies into shared memory (cp.async) land when
they are waited for, and what is read before is a Fault, as is whatever memory.py checks. Programs run one after
another, in the order that they are given.
"""

import re

import numpy as np
from memory import U8, U16, U32, U64, Fault, Shared

F32 = np.float32


def split_operands(text):
    parts, depth, cur = [], 0, ""
    for ch in text:
        if ch in "{[":
            depth += 1
        if ch in "}]":
            depth -= 1
        if ch == "," and depth == 0:
            parts.append(cur.strip())
            cur = ""
        else:
            cur += ch
    if cur.strip():
        parts.append(cur.strip())
    return parts


class Kernel:
    def __init__(self, ptx, shared, warps):
        self.shared, self.warps = shared, warps
        entry = ptx[ptx.index(".entry") :]
        self.params = {
            m[2]: i for i, m in enumerate(re.finditer(r"\.param \.(\w+)[^,\n]*?(\w+_param_\d+)", entry.split("{")[0]))
        }
        body = entry[entry.index("{") :]
        body = body[: body.index("\n}")]
        self.code, self.labels, self.bases = [], {}, {"global_smem": 0}
        for m in re.finditer(r"\.shared[^;]*?\.b8 (\w+)\[", ptx):
            self.bases.setdefault(m[1], 0)
        for line in body.splitlines():
            line = line.split("//")[0].strip()
            if not line or line.startswith(".") or line in "{}":
                continue
            if m := re.fullmatch(r"(\$\w+):", line):
                self.labels[m[1]] = len(self.code)
                continue
            for piece in line.split(";"):
                piece = piece.strip().lstrip("{}").strip()  # inline assembly in a scope of its own
                if not piece or piece.startswith("."):
                    continue
                m = re.match(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", piece)
                if not m:
                    raise Fault(f"cannot read {piece!r}")
                self.code.append((m[2], bool(m[1]), m[3], split_operands(m[4]), piece))
        self.count = 0

    def run(self, args, grid, memory, order):
        n = self.warps * 32
        for program in order:
            z, rest = divmod(program, grid[0] * grid[1])
            y, x = divmod(rest, grid[0])
            Program(self, args, (x, y, z), grid, memory, n).go()


class Program:
    def __init__(self, kernel, args, ctaid, grid, memory, n):
        self.k, self.args, self.memory, self.n = kernel, args, memory, n
        self.tid = np.arange(n, dtype=U32)
        self.warp = (self.tid // 32).astype(np.int64)
        self.lane = (self.tid % 32).astype(np.int64)
        self.r = {}
        self.special = {"%tid.x": self.tid}
        for axis, c, g in zip("xyz", ctaid, grid, strict=True):
            self.special[f"%ctaid.{axis}"] = np.full(n, c, U32)
            self.special[f"%nctaid.{axis}"] = np.full(n, g, U32)
        self.smem = Shared(max(kernel.shared, 16), kernel.warps)
        self.groups, self.open = [], []
        self.all = np.ones(n, bool)
        self.stored: set[int] = set()  # warps that stored to global memory since the last barrier

    # --- operands
    def raw(self, op, bits):
        if op in self.special:
            v = self.special[op]
        elif op in self.r:
            v = self.r[op]
        elif op.startswith("%"):
            raise Fault(f"{op} is read and was not written")
        elif op.startswith("0f"):
            v = np.full(self.n, int(op[2:], 16), U32)
        elif op.startswith("0d"):
            v = np.full(self.n, int(op[2:], 16), U64)
        elif op in self.k.bases:
            v = np.full(self.n, self.k.bases[op], U32)
        else:
            value = int(op.rstrip("U"), 0)
            v = np.full(self.n, value & (2**64 - 1), U64)
        want = {8: U8, 16: U16, 32: U32, 64: U64}[bits]
        return v if v.dtype == want else v.astype(want)

    def u(self, op, bits=32):
        return self.raw(op, bits)

    def s(self, op, bits=32):
        return self.raw(op, bits).view({16: np.int16, 32: np.int32, 64: np.int64}[bits])

    def f(self, op):
        return self.raw(op, 32).view(F32)

    def h(self, op):
        return self.raw(op, 16).view(np.float16)

    def h2(self, op):
        return self.raw(op, 32).view(np.float16).reshape(-1, 2)

    def p(self, op):
        if op in ("0", "-1", "1"):
            return np.full(self.n, op != "0")
        return ~self.r[op[1:]] if op.startswith("!") else self.r[op]

    def set(self, op, value, bits):
        want = {1: bool, 16: U16, 32: U32, 64: U64}[bits]
        value = np.ascontiguousarray(np.broadcast_to(value, (self.n,)))
        if value.dtype != want:
            value = value.view(want) if value.dtype.itemsize == np.dtype(want).itemsize else value.astype(want)
        if self.active is not self.all and op in self.r:
            value = np.where(self.active, value, self.r[op])
        self.r[op] = value

    def address(self, op):
        m = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", op)
        base = m[1]
        if base in self.k.bases:
            a = np.full(self.n, self.k.bases[base], np.int64)
        else:
            v = self.r[base]
            a = v.astype(np.int64)
        return a + int(m[2] or 0)

    def names(self, op):
        return [x.strip() for x in op.strip("{} ").split(",")] if op.startswith("{") else [op]

    # --- run
    def go(self):
        pc, code, labels = 0, self.k.code, self.k.labels
        with np.errstate(all="ignore"):
            while pc < len(code):
                pred, negate, name, ops, text = code[pc]
                self.k.count += 1
                self.active = self.all
                if pred:
                    self.active = ~self.r[pred] if negate else self.r[pred]
                if name.startswith("bra"):
                    if self.active.all():
                        pc = labels[ops[0]]
                        continue
                    if self.active.any():
                        raise Fault(f"branch is not uniform: {text}")
                    pc += 1
                    continue
                if name == "ret":
                    if self.active.all():
                        return
                    raise Fault("ret is not uniform")
                try:
                    self.step(name.split("."), name, ops, text)
                except (KeyError, ValueError, TypeError, AttributeError) as e:
                    raise Fault(f"{text}: {type(e).__name__} {e}") from e
                pc += 1
        if any(self.groups) or self.open:
            raise Fault("the program ends while a cp.async is on its way")

    def step(self, w, name, o, text):
        op = w[0]
        if op in ("ld", "st"):
            return self.move_memory(w, o, text)
        if op == "mov":
            return self.mov(w, o)
        if op == "cp":
            return self.copy(w, o, text)
        if op == "mma":
            return self.mma(o)
        if op == "ldmatrix":
            return self.ldmatrix(w, o, text)
        if op == "bar":
            if w[1] == "sync":
                self.smem.epoch += 1
                self.stored.clear()
            return
        if op == "shfl":
            assert o[3] == "31", text
            src = self.u(o[1])
            b = self.u(o[2]).astype(np.int64)
            lane = (self.lane ^ b) if w[2] == "bfly" else (b & 31)
            return self.set(o[0], src[self.warp * 32 + lane], 32)
        if op == "atom":
            if self.stored - set(self.warp[self.active].tolist()):
                raise Fault(f"{text}: releases what other warps stored since the last barrier")
            a, v = self.address(o[1]), self.u(o[2])
            old = self.r.get(o[0], np.zeros(self.n, U32)).copy()
            for i in np.nonzero(self.active)[0]:
                start, view, _ = self.memory.find(int(a[i]), int(a[i]) + 4, text)
                cell = view[a[i] - start : a[i] - start + 4].view(U32)
                old[i] = cell[0]
                cell[0] = cell[0] + v[i]
            self.r[o[0]] = old
            return
        t = w[-1]
        if t == "f32" and op in ("add", "sub", "mul", "max", "min"):
            a, b = self.f(o[1]), self.f(o[2])
            return self.set(
                o[0],
                {"add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.fmax, "min": np.fmin}[op](a, b),
                32,
            )
        if t == "f16" and op in ("add", "sub", "mul"):
            a, b = self.h(o[1]), self.h(o[2])
            return self.set(o[0], {"add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b}[op](), 16)
        if op == "fma" and t == "f16":
            exact = self.h(o[1]).astype(np.float64) * self.h(o[2]) + self.h(o[3])
            return self.set(o[0], exact.astype(np.float16), 16)
        if op == "fma" and t == "f32":
            return self.set(o[0], (self.f(o[1]).astype(np.float64) * self.f(o[2]) + self.f(o[3])).astype(F32), 32)
        if op == "div" and t == "f32":
            return self.set(o[0], (self.f(o[1]).astype(np.float64) / self.f(o[2])).astype(F32), 32)
        if op == "rsqrt":
            return self.set(o[0], (1 / np.sqrt(self.f(o[1]).astype(np.float64))).astype(F32), 32)
        if op == "ex2":
            return self.set(o[0], np.exp2(self.f(o[1]).astype(np.float64)).astype(F32), 32)
        if op == "abs":
            return self.set(o[0], np.abs(self.f(o[1])), 32)
        if op == "neg":
            return self.set(o[0], -self.f(o[1]) if t == "f32" else (-self.s(o[1])), 32)
        if t == "f16x2":
            a, b = self.h2(o[1]), self.h2(o[2])
            if op == "fma":
                r = (a.astype(np.float64) * b + self.h2(o[3])).astype(np.float16)
            else:
                r = {"add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b}[op]()
            return self.set(o[0], np.ascontiguousarray(r.astype(np.float16)).view(U32)[:, 0], 32)
        if op == "and" and t == "pred":
            return self.set(o[0], self.p(o[1]) & self.p(o[2]), 1)
        if op == "or" and t == "pred":
            return self.set(o[0], self.p(o[1]) | self.p(o[2]), 1)
        bits = int(re.sub(r"\D", "", t)) if re.sub(r"\D", "", t) else 32
        if op in ("and", "or", "xor"):
            a, b = self.u(o[1], bits), self.u(o[2], bits)
            return self.set(o[0], {"and": a & b, "or": a | b, "xor": a ^ b}[op], bits)
        if op == "not":
            return self.set(o[0], ~self.u(o[1], bits), bits)
        if op in ("shl", "shr"):
            n = self.u(o[2]).astype(np.int64)
            big = n >= bits
            n = np.minimum(n, bits - 1)
            if op == "shl":
                r = np.where(big, 0, self.u(o[1], bits) << n.astype(self.u(o[1], bits).dtype))
            elif t[0] == "s":
                r = self.s(o[1], bits) >> n.astype(self.s(o[1], bits).dtype)
            else:
                r = np.where(big, 0, self.u(o[1], bits) >> n.astype(self.u(o[1], bits).dtype))
            return self.set(o[0], r.astype({16: U16, 32: U32, 64: U64}[bits]) if r.dtype.kind == "u" else r, bits)
        if op == "bfe":
            pos, length = self.u(o[2]).astype(np.int64), self.u(o[3]).astype(np.int64)
            v = (self.u(o[1]).astype(np.int64) >> pos) & ((1 << length) - 1)
            if t == "s32":
                v = np.where(v >> (length - 1) & 1, v - (1 << length), v)
            return self.set(o[0], (v & 0xFFFFFFFF).astype(U32), 32)
        if op in ("add", "sub"):
            a, b = self.u(o[1], bits), self.u(o[2], bits)
            return self.set(o[0], a + b if op == "add" else a - b, bits)
        if op in ("mul", "mad"):
            if w[1] == "wide":
                a, b = (
                    (self.s(o[1]).astype(np.int64), self.s(o[2]).astype(np.int64))
                    if t == "s32"
                    else (self.u(o[1]).astype(U64), self.u(o[2]).astype(U64))
                )
                r = (a * b).view(U64)
                if op == "mad":
                    r = r + self.u(o[3], 64)
                return self.set(o[0], r, 64)
            if w[1] == "hi":
                assert op == "mul" and bits == 32, text
                r = (
                    (self.s(o[1]).astype(np.int64) * self.s(o[2]) >> 32).astype(np.int32)
                    if t == "s32"
                    else (self.u(o[1]).astype(U64) * self.u(o[2]) >> U64(32)).astype(U32)
                )
                return self.set(o[0], r, 32)
            assert w[1] == "lo", text
            r = self.u(o[1], bits) * self.u(o[2], bits)
            if op == "mad":
                r = r + self.u(o[3], bits)
            return self.set(o[0], r, bits)
        if op == "div":
            a, b = self.s(o[1]).astype(np.int64), self.s(o[2]).astype(np.int64)
            return self.set(o[0], (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(np.int32), 32)
        if op in ("min", "max"):
            a, b = (self.s(o[1], bits), self.s(o[2], bits)) if t[0] == "s" else (self.u(o[1], bits), self.u(o[2], bits))
            return self.set(o[0], np.minimum(a, b) if op == "min" else np.maximum(a, b), bits)
        if op == "selp":
            return self.set(o[0], np.where(self.p(o[3]), self.u(o[1], bits), self.u(o[2], bits)), bits)
        if op == "setp":
            if t == "f32":
                a, b = self.f(o[1]), self.f(o[2])
            elif t[0] == "s":
                a, b = self.s(o[1], bits), self.s(o[2], bits)
            else:
                a, b = self.u(o[1], bits), self.u(o[2], bits)
            r = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[w[1]]
            return self.set(o[0], r, 1)
        if op == "lop3":
            a, b, c, table = *(self.u(x) for x in o[1:4]), int(o[4].rstrip("U"), 0)
            r = np.zeros(self.n, U32)
            for bits in range(8):  # which of a, b and c have the bit
                if table >> bits & 1:
                    chosen = [v if bits >> place & 1 else ~v for v, place in ((a, 2), (b, 1), (c, 0))]
                    r |= chosen[0] & chosen[1] & chosen[2]
            return self.set(o[0], r, 32)
        if op == "prmt":
            a, b, sel = self.u(o[1]).astype(U64), self.u(o[2]).astype(U64), self.u(o[3])
            both = a | (b << U64(32))
            r = np.zeros(self.n, U32)
            for i in range(4):
                s = (sel >> U32(4 * i)) & U32(15)
                byte = ((both >> (U64(8) * (s & 7).astype(U64))) & U64(255)).astype(U32)
                byte = np.where(s & 8, np.where(byte & 128, U32(255), U32(0)), byte)
                r |= byte.astype(U32) << U32(8 * i)
            return self.set(o[0], r, 32)
        if op == "cvt":
            return self.cvt(w, o)
        raise Fault(f"unknown {text}")

    def cvt(self, w, o):
        d, s = w[-2], w[-1]
        if d == "f16x2":
            hi, lo = (
                self.f(o[1]).astype(np.float16).view(U16).astype(U32),
                self.f(o[2]).astype(np.float16).view(U16).astype(U32),
            )
            return self.set(o[0], (hi << U32(16)) | lo, 32)
        if d == "f32" and s == "f16":
            return self.set(o[0], self.h(o[1]).astype(F32), 32)
        if d == "f16" and s == "f32":
            return self.set(o[0], self.f(o[1]).astype(np.float16), 16)
        if d == "f16" and s == "s16":
            return self.set(o[0], self.s(o[1], 16).astype(np.float16), 16)
        if d == "f32" and s in ("s16", "s32"):
            return self.set(o[0], self.s(o[1], int(s[1:])).astype(F32), 32)
        if d == "s32" and s == "f32":
            return self.set(
                o[0],
                np.nan_to_num(np.trunc(self.f(o[1]).astype(np.float64)))
                .clip(-(2**31), 2**31 - 1)
                .astype(np.int64)
                .astype(np.int32),
                32,
            )
        if d == "s8" and s == "s32":
            return self.set(o[0], self.u(o[1]).astype(U8).view(np.int8).astype(np.int16), 16)
        sb, db = int(s[1:]), int(d[1:])
        v = self.s(o[1], sb) if s[0] == "s" else self.u(o[1], sb)
        return self.set(o[0], v.astype({16: np.int16, 32: np.int32, 64: np.int64}[db]), db)

    def mov(self, w, o):
        t = w[-1]
        if t == "pred":
            return self.set(o[0], self.p(o[1]), 1)
        bits = int(t[1:])
        if o[0].startswith("{"):
            parts = self.names(o[0])
            each = bits // len(parts)
            v = self.u(o[1], bits)
            for i, one in enumerate(parts):
                self.set(
                    one,
                    ((v >> v.dtype.type(each * i)) & v.dtype.type(2**each - 1)).astype({16: U16, 32: U32}[each]),
                    each,
                )
            return
        if o[1].startswith("{"):
            parts = self.names(o[1])
            each = bits // len(parts)
            r = np.zeros(self.n, {32: U32, 64: U64}[bits])
            for i, one in enumerate(parts):
                r |= self.u(one, each).astype(r.dtype) << r.dtype.type(each * i)
            return self.set(o[0], r, bits)
        return self.set(o[0], self.u(o[1], bits), bits)

    def move_memory(self, w, o, text):
        space = w[1]
        if space == "param":
            value = self.args[self.k.params[o[1].strip("[] ")]]
            bits = 64 if o[0].startswith("%rd") else 32
            return self.set(o[0], np.full(self.n, value & (2**bits - 1), {32: U32, 64: U64}[bits]), bits)
        t = w[-1]
        each = int(re.sub(r"\D", "", t)) // 8
        if w[0] == "ld":
            names = self.names(o[0])
            a = self.address(o[1])
            size = each * len(names)
            if space == "global":
                rows = self.memory.gather(a, self.active, size, text)
            else:
                rows = np.zeros((self.n, size), U8)
                rows[self.active] = self.smem.load(a[self.active], self.warp[self.active], size, text)
            for i, one in enumerate(names):
                part = np.ascontiguousarray(rows[:, i * each : (i + 1) * each])
                if each == 1:
                    v = part[:, 0].view(np.int8).astype(np.int16) if t[0] == "s" else part[:, 0].astype(U16)
                    self.set(one, v, 16)
                else:
                    self.set(one, part.view({2: U16, 4: U32, 8: U64}[each])[:, 0], 8 * each)
            return
        names = self.names(o[1])
        a = self.address(o[0])
        if each == 1:
            rows = np.stack([self.u(x, 16).astype(U8) for x in names], 1)
        else:
            rows = np.concatenate(
                [np.ascontiguousarray(self.u(x, 8 * each)).view(U8).reshape(self.n, each) for x in names], 1
            )
        if space == "global":
            self.memory.scatter(a, self.active, rows, text)
            self.stored |= set(self.warp[self.active].tolist())
        else:
            self.smem.store(a[self.active], self.warp[self.active], rows[self.active], text)

    def copy(self, w, o, text):
        if w[2] == "commit_group":
            self.groups.append(self.open)
            self.open = []
            return
        if w[2] in ("wait_group", "wait_all"):
            keep = int(o[0]) if w[2] == "wait_group" else 0
            if w[2] == "wait_all":
                self.groups.append(self.open)
                self.open = []
            while len(self.groups) > keep:
                for a, warp, rows, what in self.groups.pop(0):
                    index = self.smem.index(a, rows.shape[1], what)
                    np.subtract.at(self.smem.pending, index.ravel(), 1)
                    self.smem.store(a, warp, rows, what, check=False)
            return
        size = int(o[2], 0)
        dst, src = self.address(o[0]), self.address(o[1])
        active = self.active
        count = self.u(o[3]).astype(np.int64) if len(o) > 3 else np.full(self.n, size)
        rows = self.memory.gather(src, active & (count > 0), size, text)
        index = self.smem.index(dst[active], size, text)
        wr = np.broadcast_to(self.warp[active][:, None], index.shape)
        self.smem.check_write(index, wr, text)
        np.add.at(self.smem.pending, index.ravel(), 1)
        self.open.append((dst[active], self.warp[active], rows[active], text))

    def ldmatrix(self, w, o, text):
        names = self.names(o[0])
        a = self.address(o[1])
        trans = "trans" in w
        for i, one in enumerate(names):
            out = np.zeros(self.n, U32)
            for wp in range(self.k.warps):
                lanes = wp * 32 + 8 * i + np.arange(8)
                rows = self.smem.load(a[lanes], np.full(8, wp), 16, text)
                m = np.ascontiguousarray(rows).view(U16)  # 8 x 8
                if trans:
                    m = m.T
                pair = np.ascontiguousarray(m).reshape(8, 4, 2)
                out[wp * 32 : wp * 32 + 32] = (
                    pair[:, :, 0].astype(U32) | (pair[:, :, 1].astype(U32) << U32(16))
                ).reshape(32)
            self.set(one, out, 32)

    def mma(self, o):
        D, A, B, C = (self.names(x) for x in o)
        W = self.k.warps
        a = [self.h2(x).reshape(W, 8, 4, 2) for x in A]
        b = [self.h2(x).reshape(W, 8, 4, 2) for x in B]
        c = [self.f(x).reshape(W, 8, 4) for x in C]
        am = np.zeros((W, 16, 16), np.float32)
        bm = np.zeros((W, 16, 8), np.float32)
        cm = np.zeros((W, 16, 8), np.float64)
        for i in range(4):
            am[:, 8 * (i % 2) : 8 * (i % 2) + 8, 8 * (i // 2) : 8 * (i // 2) + 8] = a[i].reshape(W, 8, 8)
        for i in range(2):
            bm[:, 8 * i : 8 * i + 8, :] = b[i].reshape(W, 8, 8).transpose(0, 2, 1)
        for i in range(2):
            cm[:, 8 * i : 8 * i + 8, 0::2] = c[2 * i]
            cm[:, 8 * i : 8 * i + 8, 1::2] = c[2 * i + 1]
        d = (np.einsum("wik,wkj->wij", am.astype(np.float64), bm.astype(np.float64)) + cm).astype(F32)
        for i in range(2):
            part = d[:, 8 * i : 8 * i + 8, :]
            self.set(D[2 * i], np.ascontiguousarray(part[:, :, 0::2]).reshape(-1), 32)
            self.set(D[2 * i + 1], np.ascontiguousarray(part[:, :, 1::2]).reshape(-1), 32)
