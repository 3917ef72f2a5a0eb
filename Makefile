# make          trains everything that is not trained yet, in order; Ctrl-C and make again continues
# make test     runs the tests; make test-scale the long ones with many processes
# make STAGE    trains up to that stage: pretrain sft reward ppo gatt
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

.PHONY: all setup which-python test test-scale clean pretrain sft reward ppo gatt
.DELETE_ON_ERROR:

all: gatt
	@$(RUN) -c "import model; model.print_summary('$(OUT)')"
	@echo "Figures: $(OUT)/figures. Numbers: $(OUT)/summary.json. Talk to it: $(RUN) chat.py --out $(OUT)"

setup: $(SETUP)

which-python:
	@echo $(RUN)

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet -r requirements.txt
	@touch $@

# A stage's checkpoint appears once, at its end, and depends on that of the stage before; while it
# runs, STAGE.state.pt lets it resume.
pretrain: $(OUT)/pretrain.pt
sft: $(OUT)/sft.pt
reward: $(OUT)/reward_safety.pt
ppo: $(OUT)/ppo.pt
gatt: $(OUT)/gatt.pt

$(OUT)/pretrain.pt: | $(SETUP)
	$(RUN) pretrain.py --out $(OUT) --resume

$(OUT)/sft.pt: $(OUT)/pretrain.pt
	$(RUN) sft.py --out $(OUT) --resume

$(OUT)/reward_safety.pt: $(OUT)/sft.pt
	$(RUN) reward.py --out $(OUT) --resume

$(OUT)/ppo.pt: $(OUT)/reward_safety.pt
	$(RUN) ppo.py --out $(OUT) --resume

$(OUT)/gatt.pt: $(OUT)/ppo.pt
	$(RUN) gatt.py --out $(OUT) --resume

test: $(SETUP)
	$(RUN) -m pytest -q -m "not scale" tests

test-scale: $(SETUP)
	$(RUN) -m pytest -q -m scale tests

clean:
	rm -rf $(OUT)
