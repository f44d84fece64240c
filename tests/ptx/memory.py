"""Global and shared memory of one emulated program, with what compute-sanitizer checks: bounds, alignment, races."""

import numpy as np

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64


class Fault(Exception):
    pass


class Memory:
    def __init__(self):
        self.regions = []

    def add(self, address, view, name):
        self.regions.append((address, address + view.nbytes, view, name))
        self.regions.sort(key=lambda r: r[0])

    def find(self, low, high, what):
        for start, end, view, name in self.regions:
            if start <= low and high <= end:
                return start, view, name
        near = [(n, low - s, high - e) for s, e, _, n in self.regions if s - 4096 < low < e + 4096]
        raise Fault(f"{what}: [{low:#x}, {high:#x}) is in no tensor; near {near}")

    def gather(self, addr, active, size, what):
        out = np.zeros((len(addr), size), np.uint8)
        if not active.any():
            return out
        a = addr[active].astype(np.int64)
        if (a % size).any():
            raise Fault(f"{what}: misaligned address")
        try:
            start, view, _ = self.find(int(a.min()), int(a.max()) + size, what)
            out[active] = view[(a - start)[:, None] + np.arange(size)]
        except Fault:
            rows = []
            for one in a:
                start, view, _ = self.find(int(one), int(one) + size, what)
                rows.append(view[one - start : one - start + size])
            out[active] = rows
        return out

    def scatter(self, addr, active, data, what):
        size = data.shape[1]
        for one, row in zip(addr[active].astype(np.int64), data[active], strict=True):
            if one % size:
                raise Fault(f"{what}: misaligned address")
            start, view, _ = self.find(int(one), int(one) + size, what)
            view[one - start : one - start + size] = row


class Shared:
    def __init__(self, size, warps):
        self.data = np.full(size, 0xA7, np.uint8)
        self.written = np.zeros(size, bool)
        self.pending = np.zeros(size, np.int32)
        self.w_epoch = np.full(size, -1, np.int64)
        self.w_warp = np.full(size, -1, np.int64)
        self.r_epoch = np.full(size, -1, np.int64)
        self.r_mask = np.zeros(size, np.int64)
        self.epoch = 0

    def index(self, addr, size, what):
        if (addr % size).any():
            raise Fault(f"{what}: misaligned shared address")
        index = addr[:, None] + np.arange(size)
        if index.size and (index.min() < 0 or index.max() >= len(self.data)):
            raise Fault(f"{what}: shared address {int(index.max())} of {len(self.data)}")
        return index

    def load(self, addr, warp, size, what):
        index = self.index(addr, size, what)
        if (self.pending[index] > 0).any():
            raise Fault(f"{what}: reads shared memory that a cp.async has not been waited for")
        if not self.written[index].all():
            raise Fault(f"{what}: reads shared memory that nobody wrote")
        w = np.broadcast_to(warp[:, None], index.shape)
        if ((self.w_epoch[index] == self.epoch) & (self.w_warp[index] != w)).any():
            raise Fault(f"{what}: race: written by another warp since the last barrier")
        stale = self.r_epoch[index] != self.epoch
        flat = index.ravel()
        self.r_mask[flat[stale.ravel()]] = 0
        self.r_epoch[flat] = self.epoch
        np.bitwise_or.at(self.r_mask, flat, 1 << w.ravel())
        return self.data[index]

    def check_write(self, index, w, what):
        others = (self.r_epoch[index] == self.epoch) & ((self.r_mask[index] & ~(1 << w)) != 0)
        if others.any():
            raise Fault(f"{what}: race: read by another warp since the last barrier")

    def store(self, addr, warp, rows, what, check=True):
        index = self.index(addr, rows.shape[1], what)
        w = np.broadcast_to(warp[:, None], index.shape)
        if check:
            self.check_write(index, w, what)
            clash = (self.w_epoch[index] == self.epoch) & (self.w_warp[index] != w) & (self.data[index] != rows)
            if clash.any():
                raise Fault(f"{what}: race: two warps write")
            if (self.pending[index] > 0).any():
                raise Fault(f"{what}: writes where a cp.async is on its way")
        self.data[index] = rows
        self.written[index] = True
        self.w_epoch[index], self.w_warp[index] = self.epoch, w
