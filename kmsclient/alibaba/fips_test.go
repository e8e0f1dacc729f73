package alibaba

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// runAgain runs the calling test in a process of its own with a changed environment.
func runAgain(t *testing.T, env ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Fatalf("%v\n%s", err, out)
	}
}

// TestFIPSOnly runs this test again in a process where the SDK would panic.
func TestFIPSOnly(t *testing.T) {
	if os.Getenv("ALIBABA_TEST_FIPS") == "1" {
		_, err := New(Config{Region: "cn-hangzhou", KeyID: "key-1"})
		if err == nil || !strings.Contains(err.Error(), "fips140=only") {
			t.Fatalf("got %v", err)
		}
		return
	}
	runAgain(t, "ALIBABA_TEST_FIPS=1", "GODEBUG=fips140=only")
}

// TestFIPSOn runs a round trip in a process that uses the validated module without enforcing it.
func TestFIPSOn(t *testing.T) {
	if os.Getenv("ALIBABA_TEST_FIPS") == "1" {
		_, b := newPair(t)
		mustDataKey(t, b)
		return
	}
	runAgain(t, "ALIBABA_TEST_FIPS=1", "GODEBUG=fips140=on")
}
