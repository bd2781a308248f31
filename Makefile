# make demo and make test need nothing but Python 3.10-3.13, git and make: each sets up .venv first, and finds it ready
# the next time. make PYTHON=/path/to/python3.12 demo chooses the interpreter; ARGS passes options on: make demo ARGS="--quick"
.DEFAULT_GOAL := help
.PHONY: help setup wheels demo check test lint lab export editions clean-notebooks docs slides map
ROOT_FLAG := $(shell [ "$$(id -u)" = 0 ] && echo --allow-root)

help:
	@echo "make demo             tune a small text-to-video model and write a report: runs/demo/report.html (ARGS=--quick: a minute)"
	@echo "make lab              JupyterLab at the first tutorial"
	@echo "make check            before each commit, three minutes: lint, export, editions, fast tests, two notebooks"
	@echo "make test             everything: that and types, all notebooks, both editions of the tutorials, all tests"
	@echo "make lint             ruff and mypy alone (python tools/lint.py --counts: what is left to mend)"
	@echo "make export           notebooks -> modules, then clean the notebooks"
	@echo "make editions         tutorials -> tutorials/student and tutorials/solved"
	@echo "make docs             the documentation site: build/site/index.html (says what to install first)"
	@echo "make slides           a presentation of each tutorial, pictures and a sentence: build/slides"
	@echo "make map              the map of the course as a picture: tutorials/pictures/map.png"
	@echo "make clean-notebooks  remove what does not belong into a commit"
	@echo "make setup            .venv with the pinned packages; the others call it. On Linux without an NVIDIA card torch's CPU build"
	@echo "                      comes from TORCH_INDEX=https://download.pytorch.org/whl/cpu; OFFLINE=folder: without a network; UV=0: no uv"
	@echo "make wheels           fill a folder for OFFLINE (WHEELS=wheels)"

setup:
	@PYTHON='$(PYTHON)' sh tools/setup

WHEELS ?= wheels
wheels:
	@PYTHON='$(PYTHON)' sh tools/setup --wheels '$(WHEELS)'

demo: setup
	@.venv/bin/instructvideo-kit demo $(ARGS)

check: setup
	@.venv/bin/python tools/test.py --fast $(ARGS)

test: setup
	@.venv/bin/python tools/test.py $(ARGS)

lint: setup
	@.venv/bin/python tools/lint.py $(ARGS)

lab: setup
	@.venv/bin/jupyter lab $(ROOT_FLAG) --LabApp.news_url=None --LabApp.default_url=/lab/tree/tutorials/student/01_start_here.ipynb $(ARGS)

export: setup
	@.venv/bin/nbdev_export && .venv/bin/python tools/clean.py

editions: setup
	@.venv/bin/python tools/editions.py

clean-notebooks: setup
	@.venv/bin/python tools/clean.py

docs: setup
	@.venv/bin/python tools/docs.py

slides: setup
	@.venv/bin/python tools/slides.py

map: setup
	@.venv/bin/python tools/course_map.py
