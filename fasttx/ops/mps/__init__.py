"""ops/mps"""
