"""The command line: options, recipes, opening data, building models, cards."""
