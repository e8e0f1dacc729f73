package upstream

import (
	"math"
	"testing"
)

func TestStreamLimit(t *testing.T) {
	for name, tt := range map[string]struct {
		said  string
		limit uint32
		done  bool
	}{
		"nothing":             {"", 0, false},
		"half a head":         {"\x00\x00\x06\x04", 0, false},
		"half a setting":      {"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00", 0, false},
		"none":                {"\x00\x00\x00\x04\x00\x00\x00\x00\x00", math.MaxUint32, true},
		"another":             {"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00\x07", math.MaxUint32, true},
		"the one":             {"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x07", 7, true},
		"the last one counts": {"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x07\x00\x04\x00\x00\x00\x01\x00\x03\x00\x00\x01\x00", 256, true},
		"and what follows":    {"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x07\x00\x00\x06\x04", 7, true},
		"a cut setting":       {"\x00\x00\x05\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00", math.MaxUint32, true},
		"an acknowledgement":  {"\x00\x00\x06\x04\x01\x00\x00\x00\x00\x00\x03\x00\x00\x00\x07", math.MaxUint32, true},
		"another frame":       {"\x00\x00\x06\x06\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x07", math.MaxUint32, true},
		"a frame of 16 MiB":   {"\xff\xff\xff\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x07", math.MaxUint32, true},
		"HTTP/1":              {"HTTP/1.1 400 Bad Request\r\n\r\n", math.MaxUint32, true},
	} {
		if limit, done := streamLimit([]byte(tt.said)); limit != tt.limit || done != tt.done {
			t.Errorf("%s: %d, %t", name, limit, done)
		}
	}
}
