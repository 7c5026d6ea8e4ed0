"""Peak of the tensor bytes in a context, on tensors without storage too."""

from torch.distributed._tools.mem_tracker import MemTracker


class PeakTracker(MemTracker):
    """torch's memory tracker for the peak of all modules together.

    It also keeps the peak of each module, and for that goes through all modules at every operation:
    time quadratic in the number of layers, minutes for a hundred of them.
    """

    def _update_peak_stats(self, peak_state: object) -> None:
        for device, held in self._curr_mem_snap.items():
            if held["Total"] > self._peak_mem.get(device, 0):
                self._peak_mem[device] = held["Total"]
                self._peak_mem_snap[device] = dict(held)
