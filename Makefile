# `make demo` and `make test` need only python3.11+ with venv. They make .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
LAUNCH := accelerate launch --quiet --config_file configs/single.yaml
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test lint clean base-model paper-toy ablations readme

demo: .venv/installed
	$(LAUNCH) grpo.py --output_dir outputs/demo --overwrite $(ARGS)
	python report.py outputs/demo --out outputs/demo/report.html --png report.png

test: .venv/installed
	python -m pytest

lint: .venv/installed
	ruff check .
	ruff format --check .
	python -m pytest tests/shape.py

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

clean:
	rm -rf .venv outputs report.png

# --- the toy world, measured over seeds ---

base-model: .venv/installed
	python -m toy.base_model --output_dir outputs/base-model $(ARGS)

SEEDS ?= 0 1 2
ROADS := outputs/paper-toy
paper-toy: .venv/installed $(ROADS)/base/scores.json \
           $(foreach road,sft grpo cold,$(foreach seed,$(SEEDS),$(ROADS)/$(road)-$(seed)/scores.json))
	python eval_cvbench.py --compare $(ROADS)/*/scores.json

$(ROADS)/base/scores.json:
	$(LAUNCH) eval_cvbench.py --model toy --dataset toy --output_dir $(@D)
$(ROADS)/%/scores.json: $(ROADS)/%/final
	$(LAUNCH) eval_cvbench.py --model $< --dataset toy --output_dir $(@D)
$(ROADS)/sft-%/final:
	$(LAUNCH) sft.py --seed $* --output_dir $(@D) --overwrite
$(ROADS)/grpo-%/final:
	$(LAUNCH) grpo.py --seed $* --output_dir $(@D) --overwrite
$(ROADS)/trace-%/final:
	$(LAUNCH) sft.py --target trace --max_steps 20 --seed $* --output_dir $(@D) --overwrite
$(ROADS)/cold-%/final: $(ROADS)/trace-%/final
	$(LAUNCH) grpo.py --model $< --seed $* --output_dir $(@D) --overwrite
.SECONDARY:

ablations: .venv/installed
	python benchmarks/ablations.py

# Run the demo's seeds where needed, and write the README's tables and picture.
readme: .venv/installed
	python benchmarks/readme.py $(ARGS)
