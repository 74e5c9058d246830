import pytest

# Tests that others inherit, and what they assert with: what differs is shown for them as for any test.
pytest.register_assert_rewrite("tests.kernel.naming", "tests.kernel.receivers")
