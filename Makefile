# The front door. Every target calls invoke; `.venv/bin/invoke --list` shows all tasks.
INVOKE := .venv/bin/invoke

.DEFAULT_GOAL := help
.PHONY: help setup image test lint clean

help: ## show this
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: ## install what the tasks need (Debian packages, Python packages in .venv)
	@pipeline/setup.sh

image: setup ## fetch, build kernels and tools, bake and boot both images, publish the repository
	@$(INVOKE) image

test: setup ## run every test; builds what they need first
	@$(INVOKE) test

lint: setup ## only the linters
	@$(INVOKE) lint

clean: setup ## remove images from out/ (the store's results: invoke clean --store)
	@$(INVOKE) clean
