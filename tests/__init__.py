"""Tests: `unit` touches nothing outside its temporary folder, the other rooms use what was built."""
