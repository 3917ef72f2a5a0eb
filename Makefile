# make          trains and examines everything that is not there yet, in order; Ctrl-C and make again
#               continues
# make STAGE    trains up to that stage: pretrain sft reward rejection ppo gatt
# make check    says which findings hold
# make villages FROM=100 TO=109   trains and examines a chain in each of these villages
# make test     runs the tests; make test-scale the long ones with many processes
# make clean    removes what was trained
#
# The first run creates .venv and installs requirements.txt into it (the only step that needs the
# network), unless the Python at hand already has the packages. Choose with PYTHON=..., and the
# folder of the results with OUT=...

OUT ?= out
VILLAGE ?= 0
FROM ?= 100
TO ?= 109
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

.PHONY: all setup which-python test test-scale clean pretrain sft reward rejection ppo gatt exams check \
        villages
.DELETE_ON_ERROR:

all: exams
	@$(RUN) exam.py summary --out $(OUT)
	@$(RUN) paper.py --out $(OUT)
	@echo "Numbers: $(OUT)/summary.json. Talk to it: $(RUN) chat.py --out $(OUT)"

setup: $(SETUP)

which-python:
	@echo $(RUN)

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet -r requirements.txt
	@touch $@

# A stage's checkpoint appears once, at its end, and depends on that of the stage before; while it
# runs, STAGE.state.pt lets it resume. Its exam is a target of its own.
pretrain: $(OUT)/pretrain.pt
sft: $(OUT)/sft.pt
reward: $(OUT)/reward_safety.pt
rejection: $(OUT)/rlhf_v5.pt
ppo: $(OUT)/ppo.pt
gatt: $(OUT)/gatt.pt
exams: $(OUT)/exam/pretrain.json $(OUT)/exam/sft.json $(OUT)/exam/reward.json \
       $(OUT)/exam/rejection.json $(OUT)/exam/ppo.json $(OUT)/exam/gatt.json

$(OUT)/pretrain.pt: | $(SETUP)
	@echo "stage 1 of 6, pretraining"
	$(RUN) pretrain.py --village $(VILLAGE) --out $(OUT) --resume

$(OUT)/sft.pt: $(OUT)/pretrain.pt
	@echo "stage 2 of 6, supervised fine-tuning"
	$(RUN) sft.py --out $(OUT) --resume

$(OUT)/reward_safety.pt: $(OUT)/sft.pt
	@echo "stage 3 of 6, reward models"
	$(RUN) reward.py --out $(OUT) --resume

$(OUT)/rlhf_v5.pt: $(OUT)/reward_safety.pt
	@echo "stage 4 of 6, rejection sampling"
	$(RUN) rejection.py --out $(OUT) --resume

$(OUT)/ppo.pt: $(OUT)/rlhf_v5.pt
	@echo "stage 5 of 6, PPO"
	$(RUN) ppo.py --out $(OUT) --resume

$(OUT)/gatt.pt: $(OUT)/ppo.pt
	@echo "stage 6 of 6, Ghost Attention"
	$(RUN) gatt.py --out $(OUT) --resume

$(OUT)/exam/%.json: $(OUT)/%.pt
	$(RUN) exam.py $* --out $(OUT)

$(OUT)/exam/reward.json: $(OUT)/reward_safety.pt
	$(RUN) exam.py reward --out $(OUT)

$(OUT)/exam/rejection.json: $(OUT)/rlhf_v5.pt
	$(RUN) exam.py rejection --out $(OUT)

check: exams
	$(RUN) exam.py check --out $(OUT)

# One chain after another in OUT/villages/N; what is there already is not made again.
villages: $(SETUP)
	for n in $$(seq $(FROM) $(TO)); do \
	  $(MAKE) exams PYTHON=$(PYTHON) VILLAGE=$$n OUT=$(OUT)/villages/$$n || exit 1; \
	done
	$(RUN) exam.py villages --out $(OUT)/villages

test: $(SETUP)
	$(RUN) -m pytest -q -m "not scale" tests

test-scale: $(SETUP)
	$(RUN) -m pytest -q -m scale tests

clean:
	rm -rf $(OUT)
