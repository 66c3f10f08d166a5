// attend_256.cu -- decode attention on codes, head_dim 256.  Blocks an SM: as many as registers allow without spills.
#include "attend_forms.cuh"
ATTEND_FORMS(256, 2, 2)
