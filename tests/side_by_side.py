"""The whole suite in two processes, since most tests keep one core busy: one takes the files of tests
from the first on, one from the last back, until they meet."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PLACE = "NANOSORA_TESTS"                    # where the two meet: a folder's path, of the second


class Reporter:
    """In the second process: writes what becomes of its tests."""

    def __init__(self, config, folder):
        self.config, self.file = config, open(folder / "reports", "w")

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.file.write(json.dumps(data) + "\n")
        self.file.flush()


class Second:
    """In the first: the second process, and what it writes."""

    def __init__(self, config, folder):
        self.config, self.reports = config, open(folder / "reports", "w+")
        self.out = open(folder / "out", "w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *config.invocation_params.args],
            cwd=config.invocation_params.dir, stdout=self.out, stderr=self.out,
            env=dict(os.environ, **{PLACE: str(folder)}))

    def pass_on(self):
        """Reports here what it has written since the last call."""
        hook = self.config.hook
        while True:
            at, line = self.reports.tell(), self.reports.readline()
            if not line.endswith("\n"):
                self.reports.seek(at)
                return
            report = hook.pytest_report_from_serializable(config=self.config, data=json.loads(line))
            if isinstance(report.longrepr, list):                # why it was skipped: a tuple once
                report.longrepr = tuple(report.longrepr)
            if report.when == "setup":
                hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
            hook.pytest_runtest_logreport(report=report)

    def end(self):
        status = self.process.wait()
        self.pass_on()
        if status not in (0, 1):                                 # passed, or tests that failed
            self.out.seek(0)
            raise RuntimeError(f"the second pytest: status {status}\n{self.out.read()[-3000:]}")


def run_files(session, files, folder, after=lambda: None):
    """Runs the tests of each file that nobody has taken yet."""
    for i, items in enumerate(files):
        try:
            (folder / items[0].path.name).touch(exist_ok=False)
        except FileExistsError:
            continue
        following = [*items[1:], files[i + 1][0] if files[i + 1:] else None]
        for item, nextitem in zip(items, following):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=nextitem)
            after()
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)


def pytest_runtestloop(session):
    config, files = session.config, {}
    for item in session.items:
        files.setdefault(item.path, []).append(item)
    files = sorted(files.values(), key=lambda items: items[0].path.name == "test_pipeline.py")
    if folder := os.environ.get(PLACE):
        config.pluginmanager.register(Reporter(config, Path(folder)))
        run_files(session, files[::-1], Path(folder))            # the longest first
        return True
    option = config.option
    if (len(files) < 4 or os.cpu_count() == 1 or Path("/proc/driver/nvidia/version").exists()
            or session.testsfailed or option.collectonly or option.usepdb or option.basetemp
            or config.pluginmanager.hasplugin("xdist")):
        return None                                              # pytest's own loop
    with tempfile.TemporaryDirectory() as folder:
        second = Second(config, Path(folder))
        try:
            run_files(session, files, Path(folder), second.pass_on)
            second.end()
        finally:
            second.process.terminate()
    return True
