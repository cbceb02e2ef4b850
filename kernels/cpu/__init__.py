"""Fast paths of the CPU, under the operators' names, where they beat the reference."""
