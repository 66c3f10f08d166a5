// attend_128.cu -- decode attention on codes, head_dim 128.  Blocks an SM: as many as registers allow without spills.
#include "attend_forms.cuh"
ATTEND_FORMS(128, 3, 3)
