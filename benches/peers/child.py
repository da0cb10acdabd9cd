"""A side of a race: a process that answers one JSON object for each it is sent."""

import json
import queue
import subprocess
import tempfile
import threading
import time


class Absent(Exception):
    """This side cannot be measured; the text says why."""


class Child:
    """What it writes to stderr is kept in the folder `logs` if there is one. Once it has failed as a process (ended, too slow, no JSON) every later request fails with the same reason."""

    def __init__(self, name, command, timeout, env=None, logs=None):
        self.name, self.timeout, self.gone = name, timeout, None
        self.log = open(logs / f"{name}-{time.time():.0f}.log", "w+", errors="replace") if logs else tempfile.TemporaryFile("w+", errors="replace")
        self.answers = queue.Queue()
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, bufsize=1, env=env)
        except OSError as error:
            self.process, self.gone = None, f"cannot be started: {error}"
            self.log.close()
            return
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(None)

    def ask(self, **request):
        """Its answer. Raises Absent for `{"error": ...}` too, but then it may be asked for other things."""
        if self.gone:
            raise Absent(self.gone)
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.answers.get(timeout=self.timeout)
        except queue.Empty:
            self.fail(f"no answer to {request['run']} within {self.timeout:g} s")
        except OSError:
            line = None
        if line is None:
            self.fail(f"{self.ending()}: {self.last_words()}")
        try:
            answer = json.loads(line)
        except ValueError:
            self.fail(f"answered what is not JSON: {line.strip()[:100]}")
        if "error" in answer:
            raise Absent(answer["error"])
        return answer

    def timed(self, **request):
        """-> its times, and from when to when it was busy."""
        start = time.monotonic()
        answer = self.ask(**request)
        return answer, (start, time.monotonic())

    def fail(self, reason):
        self.gone = reason
        # It may hang, and it holds memory that the next one needs.
        if self.process.poll() is None:
            self.process.kill()
        self.stop()
        raise Absent(reason)

    def ending(self):
        try:
            return f"ended with status {self.process.wait(timeout=10)}"
        except subprocess.TimeoutExpired:
            return "closed its stdout"

    def last_words(self):
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"

    def stop(self):
        """Ends it: it goes by itself when its stdin ends, and is killed if it does not."""
        self.gone = self.gone or "was stopped"
        if self.process is None or self.reader is None:
            return
        try:
            self.process.stdin.close()
        except OSError:
            pass
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        # A child of its own may still hold the pipe.
        self.reader.join(timeout=5)
        if not self.reader.is_alive():
            self.process.stdout.close()
        self.reader = None
        self.log.close()
