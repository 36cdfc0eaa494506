# make demo    install, run the demo study, draw its charts       make test    install, run the tests
# make lint    ruff, snakefmt, snakemake --lint                   make docs    write the reference of the config
# make format  put the code into its format                       make clean   remove what the demo made
# make demo-engines   the same measurement of six engines, on tiny models; large downloads on the first run
# make test-engines   greedy tokens of vLLM and DeepSpeed, in what make demo-engines has built
# make plan STUDY=config.yaml [PROFILE=slurm]   what a study will cost: jobs, hours, disk; nothing is run
# make bench-prune   time and memory of every pruning method, as ratios to one forward pass of the calibration set
# make bench-quantize   time and memory of quantized models, as ratios to float32 and bfloat16 ones
# make bench-engines   decode speed of the engines, as ratios to HF and shares of the memory bandwidth's limit
# make test-slurm    the tests on a real Slurm, which is started here, as root      make test-slurm-demo    the demo on it
# make test-studies   the papers' studies in small, on a CPU, and a look at what they made; large downloads on the first run
# make test-report   the report of the demo in a headless browser, at the width of a phone and of a screen
# make watch [STUDY=config.yaml]   which of a study's jobs run, wait and failed, from another shell

PYTHON ?= python3
VENV := .venv
STUDY ?= config.yaml
SMALL ?= $(wildcard studies/shape/*.yaml)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TRITON := $(VENV)/.triton
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo demo-engines test test-engines test-slurm test-slurm-demo test-studies test-report watch plan check-demo bench-prune bench-quantize bench-engines lint format docs clean install

demo: $(INSTALLED)
	snakemake --cores all all report
	@echo
	@echo "Charts:"
	@ls figures/demo/*.png | sed 's/^/  /'
	@echo "Tables:"
	@ls results/demo/tables/* | sed 's/^/  /'
	@echo "Report:"
	@echo "  results/demo/report.html"

demo-engines: $(INSTALLED)
	snakemake --cores all --configfile studies/demo-engines.yaml -- all report
	@echo
	@echo "Charts:"
	@ls figures/demo-engines/*.png | sed 's/^/  /'
	@echo "Report:"
	@echo "  results/demo-engines/report.html"

# Two processes, one thread each; a file's tests stay together, because they share what is slow to make.
test: $(INSTALLED) $(TRITON)
	OMP_NUM_THREADS=1 pytest --numprocesses 2 --dist loadfile

# In the environments that make demo-engines has built; a test of one that is not there is skipped.
test-engines: $(INSTALLED)
	pytest -m engines tests/real_engines

# Continuous integration runs the first of these marks alone (`pytest -m slurm`): the second one needs MariaDB.
test-slurm: $(INSTALLED)
	pytest -m "slurm or slurm_accounting" tests/slurm

test-slurm-demo: $(INSTALLED)
	pytest -m slurm_demo tests/slurm

# The papers' studies in small, or those that SMALL names; what they have made already is not made again.
test-studies: $(INSTALLED)
	for study in $(SMALL); do snakemake --cores all --configfile $$study -- all report || exit; done
	pytest -m studies tests/studies

# The report of a finished demo, or else of a small made-up study, in a headless browser, which apt installs if need be.
test-report: $(INSTALLED)
	pytest -m browser tests/browser

# Do the numbers of a finished demo show what its charts are there to show?
check-demo: $(INSTALLED)
	pytest -m demo

# What a study will cost, before anything is run or submitted.
plan: $(INSTALLED)
	@python workflow/scripts/plan_study.py $(STUDY) $(if $(PROFILE),--profile $(PROFILE))

bench-prune: $(INSTALLED)
	python tests/benchmarks/prune.py

bench-quantize: $(INSTALLED)
	python tests/benchmarks/quantize.py

bench-engines: $(INSTALLED)
	python tests/benchmarks/engines.py

# Nothing is installed here, because jobs may be running.
watch:
	@python workflow/scripts/show_jobs.py $(STUDY)

lint: $(INSTALLED)
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow/rules
	snakemake --lint

docs: $(INSTALLED)
	python workflow/scripts/write_reference.py

format: $(INSTALLED)
	ruff check --fix .
	ruff format .
	snakefmt Snakefile workflow/rules

clean:
	rm -rf results/demo figures/demo

install: $(INSTALLED)

# torch first and alone: its own requirements bring the CPU or the CUDA build. The lock is complete, so nothing else is
# resolved (--no-deps), and the same versions stand everywhere.
$(INSTALLED): envs/main.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' envs/main.lock)"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement envs/main.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --requirement envs/main-sdist.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# The CUDA build of torch brings its own Triton. Without one, only the tests of the kernels need it (640 MB).
$(TRITON): envs/triton.lock $(INSTALLED)
	$(BIN)/python -c "import triton" 2>/dev/null || \
		$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement envs/triton.lock
	touch $@
