// attend_64.cu -- decode attention on codes, head_dim 64.  Blocks an SM: as many as registers allow without spills.
#include "attend_forms.cuh"
ATTEND_FORMS(64, 4, 3)
