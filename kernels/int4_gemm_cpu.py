"""int4_gemm on x86: torch's own CPU int4 operator for few rows, a float path for many."""
