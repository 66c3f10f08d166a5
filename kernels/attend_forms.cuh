// attend_forms.cuh -- the forms of one head_dim; each has a file of its own so that they compile side by side.
#pragma once
#include "attend_codes.cuh"

#define ATTEND_FORM(kb, vb, d, g, blocks) { kb, vb, d, g, kelvin::tile<kb, vb, d>::bytes, kelvin::detail::ring_of<kb, vb, d, g, blocks>::bytes, kelvin::attend_kernel<kb, vb, d, g, blocks> }
#define ATTEND_FORMS(d, four, eight) \
    extern const attend_form kv_attend_forms_##d[ATTEND_N_FORMS]; \
    const attend_form kv_attend_forms_##d[ATTEND_N_FORMS] = { \
        ATTEND_FORM(4, 4, d, 4, four), ATTEND_FORM(3, 3, d, 4, four), ATTEND_FORM(2, 2, d, 4, four), ATTEND_FORM(4, 3, d, 4, four), ATTEND_FORM(4, 2, d, 4, four), \
        ATTEND_FORM(4, 4, d, 8, eight), ATTEND_FORM(3, 3, d, 8, eight), ATTEND_FORM(2, 2, d, 8, eight) };
