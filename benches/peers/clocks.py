"""What the card did while times were taken: its clock, power and temperature, from nvidia-smi."""

import os
import pty
import shutil
import statistics
import subprocess
import threading
import time

FIELDS = {"sm_mhz": "clocks.sm", "watts": "power.draw", "celsius": "temperature.gpu"}
PAUSE_MS = 200


class Clocks:
    """Samples from its start to `stop`; `of` tells about stretches of time in between."""

    def __init__(self, card=0):
        self.samples, self.child, self.reason = [], None, None
        if shutil.which("nvidia-smi") is None:
            self.reason = "there is no nvidia-smi"
            return
        # One process that repeats itself: starting nvidia-smi takes longer than the pause.
        command = ["nvidia-smi", "-i", str(card), f"--query-gpu={','.join(FIELDS.values())}", "--format=csv,noheader,nounits", f"--loop-ms={PAUSE_MS}"]
        # To a terminal it writes line by line; in a pipe samples could wait, and be taken for later ones.
        ours, its = pty.openpty()
        self.child = subprocess.Popen(command, stdout=its, stderr=its)
        os.close(its)
        threading.Thread(target=self.read, args=(ours,), daemon=True).start()

    def read(self, terminal):
        with os.fdopen(terminal, errors="replace") as lines:
            try:
                for line in lines:
                    self.note(line.strip())
            except OSError:
                pass  # What reading a terminal ends with when its program has ended.

    def note(self, line):
        try:
            values = [float(value) for value in line.split(",")]
        except ValueError:
            self.reason = line or self.reason
            return
        self.samples.append((time.monotonic(), dict(zip(FIELDS, values))))

    def of(self, stretches):
        """Medians over samples within any of the (start, end) stretches; None without a sample."""
        inside = [sample for at, sample in list(self.samples) if any(start <= at <= end for start, end in stretches)]
        if not inside:
            return None
        return {field: statistics.median(sample[field] for sample in inside) for field in FIELDS} | {"samples": len(inside)}

    def stop(self):
        if self.child:
            self.child.terminate()
            self.child.wait()


def card_name(card=0):
    """Name, driver and power limit of the card, or why they are not known."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi, so no clocks"
    query = ["nvidia-smi", "-i", str(card), "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    return subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout.strip()
