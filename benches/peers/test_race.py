"""The driver with sides that are made up: python benches/peers/test_race.py. Needs neither torch nor a card."""

import json
import os
import subprocess
import sys
import tempfile
import time
import unittest
import unittest.mock
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import libraries
import report
from child import Absent, Child
from clocks import Clocks
from rounds import lora, order, race, ratio, renewed, simple

# A side: `good:T1,T2,...` answers with these times in turn, over and over; the others fail at the request number that follows.
FAKE = '''
import json, os, sys, time
arguments = sys.argv[1:]
kind = arguments[arguments.index("--config") + 1] if "--config" in arguments else "good:10" if "--serve" in arguments else arguments[0]
kind = {"eager": "good:20", "compile": "crash:4", "fp8": "error:0", "offload": "slow:0"}.get(kind, kind)
name, _, detail = kind.partition(":")
numbers = [float(x) for x in detail.split(",")]
for i, line in enumerate(iter(sys.stdin.readline, "")):
    request = json.loads(line)
    if os.environ.get("FAKE_LOG"):
        open(os.environ["FAKE_LOG"], "a").write(f"{kind} {request['run']} {request.get('file')} {request.get('resident')}\\n")
    if os.environ.get("FAKE_ARGUMENTS") and "--serve" in arguments and i == 0:
        open(os.environ["FAKE_ARGUMENTS"], "a").write(" ".join(arguments) + "\\n")
    if name == "crash" and i >= numbers[0]:
        print("all is well", file=sys.stderr)
        sys.exit("CUDA is out of memory")
    if name == "slow" and i >= numbers[0]:
        time.sleep(60)
    if name == "error" and request["run"] != "decode" or request["run"] == "nonsense":
        answer = {"error": "torchao is not installed"}
    elif request["run"] == "about":
        answer = {"about": {"text_tokens": 512}}
    else:
        times = [numbers[i % len(numbers)] if name == "good" else 1.0] * request.get("count", 1)
        answer = {"ms": times, "first_ms": 99.0, "read_ms": 7.0}
    print(json.dumps(answer), flush=True)
'''


class Races(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.fake = self.folder / "fake"
        self.fake.write_text(f"#!{sys.executable}\n{FAKE}")
        self.fake.chmod(0o755)
        self.log = self.folder / "log"

    def side(self, kind, timeout=20.0):
        child = Child(kind, [str(self.fake), kind], timeout, {**os.environ, "FAKE_LOG": str(self.log)})
        self.addCleanup(child.stop)
        return child

    def test_turns_are_taken_as_a_b_b_a(self):
        self.assertEqual("".join(order(4)), "ABBAABBA")
        sides = {"A": self.side("good:1"), "B": self.side("good:2")}
        race(sides, simple({"run": "step"}), rounds=2)
        kinds = [line.split()[0][-1] for line in self.log.read_text().splitlines()]
        self.assertEqual("".join(kinds), "111" + "222" + "1221")

    def test_medians_and_spread_leave_out_what_warmed_up(self):
        # The first three of each are warm-ups: 1000 must be nowhere.
        sides = {"A": self.side("good:1000,1000,1000,10,30,20"), "B": self.side("good:1000,1000,1000,40,20,90")}
        results = race(sides, simple({"run": "picture"}), rounds=3)
        found = results["A"]["measures"][""]
        self.assertEqual((found["median"], found["fastest"], found["slowest"], found["times"]), (20, 10, 30, [10, 30, 20]))
        compared = ratio(results, "")
        # 40 / 10, 20 / 30, 90 / 20; 40 / 20 for the medians.
        self.assertEqual((compared["median"], compared["highest"]), (2.0, 4.5))
        self.assertAlmostEqual(compared["lowest"], 2 / 3)

    def test_a_crash_is_told_with_its_last_words_and_the_other_runs_on(self):
        crashing = self.side("crash:4")
        results = race({"A": self.side("good:5"), "B": crashing}, simple({"run": "step", "count": 2}), rounds=3)
        self.assertEqual(results["B"]["absent"], "ended with status 1: CUDA is out of memory")
        self.assertEqual(results["A"]["measures"][""]["times"], [5.0] * 6)
        self.assertIsNone(ratio(results, ""))
        with self.assertRaisesRegex(Absent, "out of memory"):
            crashing.ask(run="step")

    def test_an_error_is_a_reason_but_no_end(self):
        failing = self.side("error:0")
        results = race({"A": None, "B": failing}, simple({"run": "step"}), rounds=1)
        self.assertEqual(results, {"A": {"absent": "not asked for"}, "B": {"absent": "torchao is not installed"}})
        self.assertEqual(failing.ask(run="decode")["ms"], [1.0])

    def test_a_slow_side_is_ended(self):
        slow = self.side("slow:1", timeout=0.5)
        slow.ask(run="about", count=1)
        results = race({"A": self.side("good:1"), "B": slow}, simple({"run": "step"}), rounds=1)
        self.assertEqual(results["B"]["absent"], "no answer to step within 0.5 s")
        self.assertIsNotNone(slow.process.poll())

    def test_a_program_that_is_not_there(self):
        child = Child("x", [str(self.folder / "nothing")], 1.0)
        with self.assertRaisesRegex(Absent, "cannot be started"):
            child.ask(run="about")

    def lora_files(self):
        files = [self.folder / "one.safetensors", self.folder / "two.safetensors"]
        header = json.dumps({"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}).encode()
        for file in files:
            file.write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
        return files

    def test_a_turn_with_loras(self):
        side = self.side("good:1,2,3,4,5,6")
        times, busy = lora(self.lora_files(), 0.9, 64)(side)
        self.assertEqual(list(times), ["read", "on", "step with it", "first step", "another", "back", "off", "step without"])
        self.assertEqual((times["read"], times["first step"], times["another"], times["back"]), ([7.0, 7.0], [99.0], [3.0], [4.0]))
        self.assertEqual(len(busy), 6)
        asked = [line.split()[2:] for line in self.log.read_text().splitlines()]
        one, two = (str(self.folder / f"{name}.turn.safetensors") for name in ("one", "two"))
        self.assertEqual([file for file, _ in asked], [one, "None", two, one, "None", "None"])
        self.assertEqual([resident for _, resident in asked].index("True"), 3)

    def test_a_file_is_another_one_each_turn_with_the_same_tensors(self):
        file = self.lora_files()[0]
        first, second = renewed(file).read_bytes(), renewed(file).read_bytes()
        self.assertNotEqual(first, second)
        for content in (first, second):
            end = 8 + int.from_bytes(content[:8], "little")
            header = json.loads(content[8:end])
            self.assertEqual((end % 8, content[end:], header["a"]["data_offsets"]), (0, b"abc", [0, 3]))

    def test_cudas_wheels_come_after_what_is_there(self):
        site = self.folder / "site"
        (site / "nvidia" / "cudnn" / "lib").mkdir(parents=True)
        with unittest.mock.patch.dict(os.environ, {"LD_LIBRARY_PATH": "/own:/more"}), unittest.mock.patch.object(sys, "path", [str(site)]):
            folders = libraries.path().split(":")
        self.assertEqual((folders[:2], folders[-1]), (["/own", "/more"], str(site / "nvidia" / "cudnn" / "lib")))

    def test_clocks_are_those_of_the_stretch(self):
        smi = self.folder / "nvidia-smi"
        # Not flushed: as nvidia-smi may, it writes line by line only to a terminal.
        smi.write_text(f"#!{sys.executable}\nimport time\nfor i in range(100):\n    print(f'{{i}}, 700.5, 60')\n    time.sleep(0.02)\n")
        smi.chmod(0o755)
        with unittest.mock.patch.dict(os.environ, {"PATH": str(self.folder)}):
            clocks = Clocks()
        self.addCleanup(clocks.stop)
        while len(clocks.samples) < 12:
            time.sleep(0.01)
        times = [at for at, _ in clocks.samples]
        found = clocks.of([(times[2], times[4]), (times[10], times[11])])
        self.assertEqual(found, {"sm_mhz": 4, "watts": 700.5, "celsius": 60, "samples": 5})
        self.assertIsNone(clocks.of([(0, 1)]))

    def test_the_whole_program(self):
        (self.folder / "made.json").write_text('{"size": "tiny"}')
        out = self.folder / "out.json"
        command = [sys.executable, str(HERE / "race.py"), "--folder", str(self.folder), "--size", "tiny", "--darkroom", str(self.fake),
                   "--python", str(self.fake), "--peers", "eager,compile,fp8,offload", "--runs", "step,picture", "--rounds", "2",
                   "--timeout", "2", "--json", str(out)]
        told = self.folder / "told"
        environment = {**os.environ, "FAKE_ARGUMENTS": str(told)}
        text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        # darkroom is loaded once for the peers in 16 bits, and once for those in fp8, which it meets in fp8.
        kept = ["--keep fp8-products" in line for line in told.read_text().splitlines()]
        self.assertEqual(sorted(kept), [False, True])
        races = {(race["peer"], race["run"]): race for race in json.loads(out.read_text())["races"]}
        self.assertEqual(races["eager", "step"]["sides"]["B"]["measures"][""]["median"], 20.0)
        self.assertRegex(text, r"eager +step +10\.0 \(10\.0 to 10\.0\) +20\.0 \(20\.0 to 20\.0\) +2\.00 \(2\.00 to 2\.00\)")
        # It crashed in the race of steps: its pictures are absent for the same reason, and darkroom's are there.
        for run in ("step", "picture"):
            self.assertEqual(races["compile", run]["sides"]["B"]["absent"], "ended with status 1: CUDA is out of memory")
            self.assertEqual(races["compile", run]["sides"]["A"]["measures"][""]["median"], 10.0)
        self.assertIn("fp8 is absent: torchao is not installed", text)
        self.assertIn("offload is absent: no answer to about within 2 s", text)
        self.assertNotIn(("offload", "step"), races)
        # Made in two calls: races of before stay, and one that is made again takes the place of what it was.
        again = command[:command.index("--peers")] + ["--peers", "eager", "--runs", "step"] + command[command.index("--rounds"):]
        subprocess.run(again, check=True, stdout=subprocess.PIPE, env=environment)
        both = [(race["peer"], race["run"]) for race in json.loads(out.read_text())["races"]]
        self.assertEqual(sorted(both), sorted(races))
        # Without darkroom there is no race.
        command[command.index("--darkroom") + 1] = str(self.folder / "nowhere")
        alone = subprocess.run(command, capture_output=True, text=True, env=environment)
        self.assertEqual(alone.returncode, 1)
        self.assertIn("darkroom does not run here", alone.stderr)

    def test_darkroom_against_itself(self):
        (self.folder / "made.json").write_text('{"size": "tiny"}')
        out, told = self.folder / "out.json", self.folder / "told"
        command = [sys.executable, str(HERE / "race.py"), "--folder", str(self.folder), "--size", "tiny", "--python", "nobody",
                   "--darkroom-arguments", "--keep q8_0", "--against", "--keep q8_0 --vram-limit 12", "--runs", "step", "--rounds", "2",
                   "--json", str(out), "--darkroom"]
        text = subprocess.run([*command, str(self.fake)], check=True, stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "FAKE_ARGUMENTS": str(told)}).stdout
        limits = [line.partition("f32 ")[2] or line.partition("bf16 ")[2] for line in told.read_text().splitlines()]
        self.assertEqual(limits, ["--keep q8_0", "--keep q8_0 --vram-limit 12"])
        races = json.loads(out.read_text())["races"]
        self.assertEqual([(race["peer"], race["run"]) for race in races], [("darkroom --keep q8_0 --vram-limit 12", "step")])
        self.assertRegex(text, r"step +10\.0 \(10\.0 to 10\.0\) +10\.0 .* 1\.00 ")
        alone = subprocess.run(command[:-1], capture_output=True, text=True)
        self.assertIn("--against needs --darkroom", alone.stderr)

    def test_digits(self):
        self.assertEqual([report.digits(ms) for ms in (0.1234, 12.34, 123.4, 5678.9)], ["0.12", "12.3", "123.4", "5679"])


if __name__ == "__main__":
    unittest.main()
