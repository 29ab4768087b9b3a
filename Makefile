# make test          the test suite (less tests/test_ray.py, which wants `.[ray]`), in .venv with the versions of constraints.txt
# make test-as-avx2  the test suite as if the processor had AVX2 alone, and test-as-avx512 AVX-512 without VNNI and bf16:
#                    Linux on x86-64, a C compiler (benchmarks/as_cpu.c)
# make demo          the demonstration, in the same environment
# make lint          style and format
# make test-lowest   the test suite in .venv-lowest, every dependency at its lower bound in pyproject.toml
# make audit         known vulnerabilities of the versions in constraints.txt, asked of PyPI; fails where it has no answer
# make clean         removes these environments and all caches
#
# The network is needed to install, never to test. torch goes first, so that its build is a choice. Without CUDA:
#   make test TORCH='torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu'
# The same for the lower bounds, when only one build of torch is at hand (all others stay at theirs):
#   make test-lowest TORCH=torch==2.13.0

PYTHON ?= python3
VENV ?= .venv
VENV_LOWEST ?= .venv-lowest
VENV_AUDIT ?= .venv-audit
TORCH ?=
EXTRAS := test,dev,space,explain
EXTRAS_LOWEST := test,dev

.PHONY: test test-as-avx2 test-as-avx512 demo lint test-lowest audit clean

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n auto --dist loadfile

test-as-avx2 test-as-avx512: test-as-%: $(VENV)/.installed
	cc -shared -fPIC -o $(VENV)/as_cpu.so benchmarks/as_cpu.c -ldl
	AS_CPU=$* LD_PRELOAD=$(abspath $(VENV)/as_cpu.so) $(VENV)/bin/python -m pytest -n auto --dist loadfile

demo: $(VENV)/.installed
	$(VENV)/bin/python hub_models/gaml-bert-demo/demo.py

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

# datasets before 5.2 leaves a CSV file it has read to the garbage collector; elsewhere that warning is an error.
test-lowest: $(VENV_LOWEST)/.installed
	$(VENV_LOWEST)/bin/python -m pytest -n auto --dist loadfile -W 'ignore:unclosed file:ResourceWarning'

# --strict: else a package that PyPI's JSON API does not know here, as behind a mirror, counts as one without a finding.
audit: $(VENV_AUDIT)/.installed
	$(VENV_AUDIT)/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

clean:
	rm -rf $(VENV) $(VENV_LOWEST) $(VENV_AUDIT) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# $(call install,environment,pins,extras): torch from the pins unless TORCH says otherwise, then the rest.
define install
	@grep -v '^torch==' $(2) > $(1)/constraints.txt
	@echo 'Installing into $(1): some minutes the first time.'
	@$(1)/bin/python -m pip install -qq --no-compile --disable-pip-version-check -c $(1)/constraints.txt \
		$(if $(TORCH),$(TORCH),$$(grep '^torch==' $(2)))
	@$(1)/bin/python -m pip install -qq --no-compile --disable-pip-version-check -c $(1)/constraints.txt -e '.[$(3)]'
	@touch $@
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(VENV)
	$(call install,$(VENV),constraints.txt,$(EXTRAS))

$(VENV_AUDIT)/.installed:
	@$(PYTHON) -m venv $(VENV_AUDIT)
	@$(VENV_AUDIT)/bin/python -m pip install -qq --disable-pip-version-check 'pip-audit>=2.10'
	@touch $@

# Only what pyproject.toml names is lowered; what those packages need in turn is the newest they accept. Without Gradio,
# which asks for a newer huggingface_hub.
$(VENV_LOWEST)/.installed: pyproject.toml
	@$(PYTHON) -m venv $(VENV_LOWEST)
	@$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
		| sed 's/>=/==/' > $(VENV_LOWEST)/lowest.txt
	$(call install,$(VENV_LOWEST),$(VENV_LOWEST)/lowest.txt,$(EXTRAS_LOWEST))
