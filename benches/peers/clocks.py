"""What the card did while times were taken: its clock, power and temperature, from nvidia-smi."""

import shutil
import statistics
import subprocess
import threading
import time

FIELDS = {"sm_mhz": "clocks.sm", "watts": "power.draw", "celsius": "temperature.gpu"}
PAUSE_MS = 100


class Clocks:
    """Samples from its start to `stop`; `of` tells about stretches of time in between."""

    def __init__(self, card=0):
        self.samples, self.child, self.reason = [], None, None
        if shutil.which("nvidia-smi") is None:
            self.reason = "there is no nvidia-smi"
            return
        # One process that repeats itself: starting nvidia-smi takes longer than the pause.
        command = ["nvidia-smi", "-i", str(card), f"--query-gpu={','.join(FIELDS.values())}", "--format=csv,noheader,nounits", f"-lms={PAUSE_MS}"]
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.child.stdout:
            try:
                values = [float(value) for value in line.split(",")]
            except ValueError:
                self.reason = line.strip() or self.reason
                continue
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
