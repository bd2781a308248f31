"""What pyproject.toml cannot say: a wheel carries the course, for `instructvideo-kit tutorials --to FOLDER`."""
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

COURSE = ("student", "solved", "logs") # of tutorials/; logs are what the notebooks read beside the kit itself


class BuildWithCourse(build_py):
    "Modules and weights as ever, and tutorials/ beside them as instructvideo_kit/course."
    def run(self):
        super().run()
        if self.editable_mode: return # a checkout has tutorials/ itself
        for name in COURSE:
            target = Path(self.build_lib)/"instructvideo_kit/course"/name
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(Path("tutorials")/name, target, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))


setup(cmdclass={"build_py": BuildWithCourse})
