# Everything is built under .cache; only Python is needed to start. See scripts/.
#   make demo   [PROMPT=...] [WIDTH=...] [HEIGHT=...] [STEPS=...] [SEED=...] [MODEL=name or folder]
#   make serve  [PORT=8188] [ARGS="--listen"]    flags of ComfyUI
#   make fleet-demo [ARGS=overlap]      one AR service and two workers; overlap measures it
#   make test   [ARGS="tests/core -k tokens"]
#   make soak
#   make fuzz   [TIMES=200]             the readers' property tests, for about an hour
#   make bench  [PRESET="small medium"]     full on a GPU
#   make gpu                            packs .gpu/, for `python3 -m scripts.gpu.run` elsewhere
#   make simulated-cards [ARGS="24 16"]     memory of full-size networks, counted
#   make train-tiny [ARGS="decoder --minutes 60"]
#   make eval   [ARGS="--count 50 --servers 2 --kinds latin --size 768x512"]
#   make pictures [ARGS="redo_region"]      the workflows' pictures, by the trained model
# COMFYUI_PATH=folder runs any of them on another ComfyUI checkout.
PYTHON ?= python3

.PHONY: demo serve fleet-demo test lint workflows pictures bench gpu simulated-cards soak fuzz train-tiny eval clean python

demo lint soak: python
	@$(PYTHON) -m scripts $@

serve: python
	@$(PYTHON) -m scripts serve $(ARGS)

fleet-demo: python
	@$(PYTHON) -m scripts fleet-demo $(ARGS)

workflows: python
	@$(PYTHON) -m scripts workflows $(ARGS)

pictures: python
	@$(PYTHON) -m scripts pictures $(ARGS)

bench: python
	@$(PYTHON) -m scripts bench $(PRESET)

gpu: python
	@$(PYTHON) -m scripts.gpu.pack

simulated-cards: python
	@$(PYTHON) -m scripts simulated-cards $(ARGS)

fuzz: python
	@$(PYTHON) -m scripts fuzz $(TIMES)

train-tiny: python
	@$(PYTHON) -m scripts train $(ARGS)

eval: python
	@$(PYTHON) -m scripts evaluate $(ARGS)

test: lint
	@$(PYTHON) -m scripts test $(ARGS)

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	    "Python 3.10 or newer is needed, this is " + sys.version + "; PYTHON= names another.")'

clean:
	rm -rf .cache output
