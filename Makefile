# Everything is made under .cache from nothing but Python; see scripts/.
#   make demo   [PROMPT=...] [WIDTH=...] [HEIGHT=...] [SEED=...] [MODEL=name or snapshot folder]
#   make serve  [PORT=8188]
#   make test   [ARGS="tests/core -k tokens"]
#   make soak
#   make bench  [PRESET="small medium"]     full on a GPU
# COMFYUI_PATH=folder runs each of them on another ComfyUI checkout.
PYTHON ?= python3

.PHONY: demo serve test lint workflows bench soak clean python

demo serve lint soak: python
	@$(PYTHON) -m scripts $@

workflows: python
	@$(PYTHON) -m scripts workflows $(ARGS)

bench: python
	@$(PYTHON) -m scripts bench $(PRESET)

test: lint
	@$(PYTHON) -m scripts test $(ARGS)

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	    "Python 3.10 or newer is needed, this is " + sys.version + "; PYTHON= names another.")'

clean:
	rm -rf .cache output
