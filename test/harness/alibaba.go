package harness

import "github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"

// NewAlibaba starts a simulated Alibaba Cloud KMS. Every data key that it generates, and every
// secret that it wraps, is added to the environment's canaries.
func (e *Env) NewAlibaba() *kmsdouble.Double {
	e.TB.Helper()
	return kmsdouble.New(e.TB, kmsdouble.Config{OnSecret: e.Sealed.Add})
}

// AlibabaKey returns a provider with the default key of a simulated KMS, polled every second.
func (e *Env) AlibabaKey(name string, double *kmsdouble.Double) KMSConfig {
	e.TB.Helper()
	e.Sealed.Add("the access key's secret", []byte(kmsdouble.DefaultAccessKeySecret))
	return KMSConfig{Name: name, PollInterval: "1s", Alibaba: &Alibaba{
		Region: double.Region(), KeyID: kmsdouble.DefaultKeyID, Endpoint: double.Endpoint(), CAFile: double.CAFile(),
		Credentials: AlibabaCredentials{
			Type:                "accessKey",
			AccessKeyIDFile:     e.File("id", []byte(kmsdouble.DefaultAccessKeyID)),
			AccessKeySecretFile: e.File("secret", []byte(kmsdouble.DefaultAccessKeySecret)),
		},
	}}
}
