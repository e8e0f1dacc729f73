package purge

import "testing"

func TestWatchIsWhole(t *testing.T) {
	for version, want := range map[string]bool{
		"": false, "none": false, "3": false, "2.3.8": false, "3.3.27": false, "3.4.23": false, "3.4.30": false, "3.4.31": true, "3.5.0": false, "3.5.12": false,
		"3.5.13": true, "3.5.35": true, "3.6.0": true, "3.6.0-rc.1": true, "3.7.3": true, "3.8.0-alpha.0": true, "3.10.0": true, "4.0.0": true,
	} {
		if got := watchIsWhole(version); got != want {
			t.Errorf("%q: %v, want %v", version, got, want)
		}
	}
}
