"""What pyproject.toml cannot say: a wheel carries the course, for `instructvideo-kit tutorials --to FOLDER`."""
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

COURSE = ("student", "solved", "logs") # of tutorials/; logs are what the notebooks read beside the kit itself


class BuildWithCourse(build_py):
    "Modules and weights as ever, and tutorials/ beside them as instructvideo_kit/course."
    def run(self):
        if self.editable_mode: return super().run() # a checkout has tutorials/ itself
        package = Path(self.build_lib)/"instructvideo_kit"
        shutil.rmtree(package, ignore_errors=True) # of an earlier build: modules that are gone would come along
        super().run()
        for name in COURSE:
            target = package/"course"/name
            shutil.copytree(Path("tutorials")/name, target, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))


setup(cmdclass={"build_py": BuildWithCourse})
