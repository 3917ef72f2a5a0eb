# make          trains everything that is not trained yet, in order; Ctrl-C and make again continues
# make test     runs the tests
# make STAGE    trains up to that stage: pretrain
# make clean    removes what was trained
#
# The first run creates .venv and installs requirements.txt into it (the only step that needs the
# network), unless the Python at hand already has the packages. Choose with PYTHON=..., and the
# folder of the results with OUT=...

OUT ?= out
PYTHON ?= python3
PACKAGES := torch numpy sentencepiece matplotlib pytest
HAS := $(shell $(PYTHON) -c "import sys; from importlib.util import find_spec; \
         sys.exit(not all(map(find_spec, sys.argv[1:])))" $(PACKAGES) 2>/dev/null && echo yes)
ifeq ($(HAS),yes)
  RUN := $(PYTHON)
  SETUP :=
else
  RUN := .venv/bin/python
  SETUP := .venv/ready
endif

.PHONY: all setup which-python test clean pretrain
.DELETE_ON_ERROR:

all: pretrain
	@echo "All stages are trained. Figures: $(OUT)/figures. Metrics: $(OUT)/*.jsonl"

setup: $(SETUP)

which-python:
	@echo $(RUN)

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet -r requirements.txt
	@touch $@

pretrain: $(OUT)/pretrain.pt

# A stage's checkpoint appears once, at its end; while it runs, STAGE.state.pt lets it resume.
$(OUT)/pretrain.pt: | $(SETUP)
	$(RUN) pretrain.py --out $(OUT) --resume

test: $(SETUP)
	$(RUN) -m pytest -q tests

clean:
	rm -rf $(OUT)
