// The only place that compiles products.h.
#define LCW_PRODUCTS_HERE
#include "products.h"
