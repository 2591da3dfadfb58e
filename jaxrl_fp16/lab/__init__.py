"""Pictures and tables of what runs measured."""
