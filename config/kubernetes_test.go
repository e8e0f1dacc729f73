package config

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestKubernetes(t *testing.T) {
	const kms = "kms: [{name: old, kubernetes: {type: aescbc, keyFile: old.yaml}}, {name: dev, plugin: {endpoint: unix:///run/k.sock}}]\n"
	path := write(t, minimal+kms+"rules: [{prefix: a, writeWith: dev, readWith: [old]}, {prefix: b, writeWith: plaintext, readWith: [old]}]\n")
	keys := filepath.Join(filepath.Dir(path), "old.yaml")
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), "kms[0].kubernetes.keyFile: ") {
		t.Errorf("without its key file: %v", err)
	}
	put(t, keys, nil)
	got, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&Kubernetes{Type: "aescbc", KeyFile: keys}, got.KMS[0].Kubernetes); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	for text, want := range map[string]string{
		"kms: [{name: old, kubernetes: {keyFile: KEYS}}]":                                                  "line 7: kms[0].kubernetes.type: is required",
		"kms: [{name: old, kubernetes: {type: aescbc}}]":                                                   "line 7: kms[0].kubernetes.keyFile: is required",
		"kms: [{name: old, kubernetes: {type: kms, keyFile: KEYS}}]":                                       `line 7: kms[0].kubernetes.type: "kms" is unknown (write aescbc or aesgcm or secretbox)`,
		"kms: [{name: old, seedMaxAge: 1h, kubernetes: {type: aesgcm, keyFile: KEYS}}]":                    "line 7: kms[0].seedMaxAge: has no effect with kubernetes",
		"kms: [{name: old, local: {keyFile: KEYS}, kubernetes: {type: aesgcm, keyFile: KEYS}}]":            "line 7: kms[0]: has more than one backend: local and kubernetes",
		kmsOld + "rules:\n- {prefix: a, writeWith: old}":                                                   `line 9: rules[0].writeWith: provider "old" is of kind kubernetes`,
		kmsOld + "rules:\n- prefix: a\n  writeWith: dev\n  recovery: [old]":                                `line 11: rules[0].recovery[0]: provider "old" is of kind kubernetes`,
		kmsOld + "rules:\n- {prefix: b, writeWith: dev}\n- prefix: a\n  readWith: [dev]\n  writeWith: old": `line 12: rules[1].writeWith: provider "old" is of kind kubernetes`,
	} {
		path := write(t, minimal+strings.ReplaceAll(text, "KEYS", keys)+"\n")
		_, err := Load(path)
		ps, ok := errors.AsType[Problems](err)
		if !ok || len(ps) != 1 || !strings.Contains(err.Error(), want) || ps[0].Hint == "" && !strings.Contains(want, "required") {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
}

const kmsOld = "kms: [{name: old, kubernetes: {type: aescbc, keyFile: KEYS}}, {name: dev, plugin: {endpoint: unix:///run/k.sock}}]\n"

func TestCheckProviderName(t *testing.T) {
	for name, good := range map[string]bool{"a": true, "my-kms_1.x": true, "": false, "plaintext": false, "a:b": false, "-a": false, "a/b": false} {
		text, hint := CheckProviderName(name)
		if (text == "") != good || (hint == "") != good {
			t.Errorf("%q: %q, %q", name, text, hint)
		}
	}
}
